"""Export and import of distilled sets.

    about.py       metadata of every export (lad_dist.json)
    publishing.py  atomic publishing of an export folder; what it may replace
    pictures.py    pixels, PNG bytes, the grid
    pt.py          export and import of images_best.pt, labels_best.pt, lr_best.pt: the files of MTT, DATM and LAD
    folder.py      PNG files in a folder per class with soft labels; grids alone
    tables.py      export and import of Parquet, alone or as a Hugging Face data set
    card.py        README.md of a Hugging Face data set
    export.py      export of a distilled set in one of these forms
    incoming.py    an imported set, whatever its form, and the meaning of its labels
    install.py     installs an imported set in a run folder for evaluation

docs/exchange.md documents the files.
"""
