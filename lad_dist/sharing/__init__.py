"""Distilled sets at an address: pushed, pulled and loaded from a hub, a web server or a folder.

    address.py   what an address names
    contents.py  the files of a shared set, without what is private; their checksums
    card.py      README.md: the card of the data set
    hub.py       the Hugging Face hub; the only file that imports huggingface_hub
    web.py       files of a web server
    transfer.py  push, pull and load, whatever the address

docs/sharing.md documents the files.
"""
