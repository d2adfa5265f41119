"""What a job will need before it runs: memory, disk and hours of each stage, and the number of ranks that still helps.

dataset_info.py  what is known of the data set, whether it is here or not
shapes.py        sizes of the network: parameters, activations, operations
memory.py        bytes on the device, on the host and on disk
speed.py         seconds of one step of each kind, from a table of devices
calibration.py   the same, measured on this device
threads.py       how many CPU threads a process works with, chosen by timing
scaling.py       the cost of ranks: shares of a batch, and what the ranks say to each other
resources.py     where the job will run: devices, hosts, memory
limits.py        what cannot fit, and the change that makes it fit
estimate.py      all of it together
show.py          as a table
"""
