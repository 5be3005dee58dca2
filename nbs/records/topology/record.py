"""Makes the record `topology`: python nbs/records/topology/record.py DATA

DATA holds train/CLASS/* and test/CLASS/* of CIFAR-10 as images.
"""
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from scipy.optimize import linear_sum_assignment

from efcn_nb.service.timing import peak_memory, timed
from efcn_nb.materials.data import Data, load_data
from efcn_nb.ladder.masks import random_mask
from efcn_nb.experiments.runs import environment
from efcn_nb.instruments.topologies import bench_topology, topology_distance
from efcn_nb.studies.topology import TopologySettings, topology_study
from efcn_nb.service.records import record_folder

torch.set_num_threads(1)
here, record = Path(__file__).parent, record_folder('topology')


def mask(units, inputs, density, seed):
    return random_mask((units, inputs), density, torch.Generator().manual_seed(seed))


def authors_loop(a, b):
    "As in the authors' script: np.intersect1d of the input sets of each pair of units."
    A, B = ([row.nonzero()[0] for row in m.numpy()] for m in (a, b))
    cost = np.zeros((len(A), len(B)))
    for j, s in enumerate(A):
        for k, t in enumerate(B):
            shared = len(np.intersect1d(s, t))
            if len(s) + len(t): cost[j, k] = 1 - shared/(len(s) + len(t) - shared)
    return cost[linear_sum_assignment(cost)].mean()


data = load_data(sys.argv[1], size=16, name='CIFAR-10 (JPEG), 6,000 images, 16x16')
data = Data(data.train.thinned(6_000), data.test.thinned(2_000))
settings = TopologySettings(
    lrs=(.001, .003), epochs=20, search_epochs=10, batch_size=100, channels=8, keep=(0, 1, 2, 5, 10, 20), draws=1)
tables = topology_study(data, here/'efcn_runs', settings)
for name, table in tables.items(): table.round(5).to_csv(record/f'{name}.csv', index=False)

speed = bench_topology(784, [.007, .05, .1], repeat=3)
seconds = timed(lambda: authors_loop(mask(784, 784, .007, 0), mask(784, 784, .007, 1)))
speed["authors' loop (s)"] = [seconds, None, None]
speed["authors' loop / this"] = speed["authors' loop (s)"]/speed['this (s)']
speed.round(3).to_csv(record/'speed.csv', index=False)

sizes, densities = [3072, 4000, 1000, 4000], [.0115, .025, .025] # SET's network for CIFAR-10
a, b = ([mask(n, m, d, 10*seed + i) for i, (m, n, d) in enumerate(zip(sizes, sizes[1:], densities))] for seed in (0, 1))
seconds = timed(lambda: topology_distance(a, b))
memory = peak_memory(lambda: topology_distance(a, b))
wide = dict(layers='-'.join(map(str, sizes)), seconds=seconds, memory_GB=memory/1e9, distance=topology_distance(a, b))
pd.DataFrame([wide]).round(3).to_csv(record/'wide.csv', index=False)

made_by = ', '.join(f'{k} {v}' for k, v in environment().items() if k != 'platform')
(record/'command.txt').write_text(
    'python nbs/records/topology/record.py DATA\n'
    '(DATA is a folder of images, train/CLASS/*.jpg and test/CLASS/*.jpg, of which 6,000 and 2,000, evenly spread, are '
    'used: 4,800 train, 1,200 choose learning rates)\n' + made_by + ', fp32, shared with other work\n')
