"""Makes the record `pruning` (rounds.csv, profiles.csv, units.csv, claims.csv and interactions.csv) of CIFAR-10 as a
folder of images, train/CLASS/* and test/CLASS/*: python nbs/records/pruning/record.py FOLDER"""
import sys
from pathlib import Path

import torch

from efcn_nb.experiments.runs import environment
from efcn_nb.materials.data import load_folder
from efcn_nb.studies.pruning import pruning_study
from efcn_nb.service.records import record_folder

torch.set_num_threads(1)
here, record = Path(__file__).parent, record_folder('pruning')
data = load_folder(sys.argv[1], size=16, name='CIFAR-10 (JPEG), 20,000 images, 16x16')
data = data._replace(train=data.train.thinned(20_000))
for name, table in pruning_study(data, here/'efcn_runs', progress=True).items():
    table.round(5).to_csv(record/f'{name}.csv', index=False)
places = ', '.join(f'{k} {v}' for k, v in environment().items() if k != 'platform')
(record/'command.txt').write_text(
    'python nbs/records/pruning/record.py FOLDER\n'
    '(FOLDER: CIFAR-10 as JPEG, halved to 16 x 16 pixels when loaded; 20,000 of the 50,000 training images, evenly '
    'spread, and all 10,000 test images)\n'
    f'{places}, fp32; at low priority, on cores shared with other work\n')
