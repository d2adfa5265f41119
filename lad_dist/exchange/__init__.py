"""Distilled sets for others, and from others.

    about.py       what every export says of itself (lad_dist.json)
    publishing.py  a folder that appears whole, and what it may replace
    pictures.py    pixels, PNG bytes, the grid
    pt.py          images_best.pt, labels_best.pt, lr_best.pt: the files of MTT, DATM and LAD, out and in
    folder.py      PNG files in a folder per class, soft labels beside them; and the grids alone
    tables.py      Parquet, alone or as a Hugging Face data set; out and in
    card.py        the README.md of those folders
    export.py      one distilled set in one of these forms
    incoming.py    what was read, whatever its form, and what its labels mean
    install.py     such a set into a run folder, to be evaluated there

docs/exchange.md describes the files for their readers.
"""
