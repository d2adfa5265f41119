"""Estimate a job before it runs: memory, disk and hours of each stage, and the number of ranks that still helps.

dataset_info.py  facts about the data set, whether it is here or not
shapes.py        sizes of the network: parameters, activations, operations
memory.py        bytes on the device, on the host and on disk
speed.py         seconds of one step of each kind, from a table of devices
calibration.py   the same, measured on this device
threads.py       number of CPU threads of a process, chosen by timing
scaling.py       cost of ranks: shares of a batch, and communication
resources.py     where the job will run: devices, hosts, memory
limits.py        what cannot fit, and the change that makes it fit
estimate.py      the whole plan
show.py          the plan as tables
units.py         bytes and seconds as people read them
"""
