"""llama.cpp's own server, as its package has it: `python llama_server.py MODEL PORT`; ends with its stdin."""

import os
import sys

import xllamacpp

params = xllamacpp.CommonParams()
params.model.path = sys.argv[1]
params.n_ctx = 1024
params.n_parallel = 1
# It looks for a client that has hung up between two batches only.
params.n_batch = params.n_ubatch = 32
params.cpuparams.n_threads = 2
params.cpuparams.poll = 0  # threads that wait for each other by spinning are very slow beside other programs
params.endpoint_metrics = True
params.hostnames = ["127.0.0.1"]
params.port = int(sys.argv[2])
server = xllamacpp.Server(params)
print(server.listening_address, flush=True)
sys.stdin.read()
os._exit(0)
