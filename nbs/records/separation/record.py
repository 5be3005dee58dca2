"""Makes the record `separation` (bits.csv, longer.csv, digits.csv and starts.csv):
python nbs/records/separation/record.py"""
from pathlib import Path

import torch

from efcn_nb.experiments.runs import environment
from efcn_nb.experiments.sweeps import sweep
from efcn_nb.studies.separation import final_rows, learn_digits, learn_pattern
from efcn_nb.service.records import record_folder

torch.set_num_threads(1)
here, record, seeds = Path(__file__).parent, record_folder('separation'), range(5)

def runs(kinds, ns, seeds, bits='consecutive', **other):
    "Settings for all seeds, sizes and networks."
    return [dict(kind=kind, n=n, bits=bits, seed=seed, **other) for seed in seeds for n in ns for kind in kinds]


four = ('cnn', 'lcn', 'fcn', 'efcn')
bits = runs(('cnn', 'lcn', 'wide', 'fcn', 'efcn'), (16, 24, 32, 40, 48, 64, 96), seeds)
bits += runs(four, [128], seeds)
bits += runs(four, (16, 32, 48, 64), seeds, 'scattered')
digits = runs(four, (5, 7, 9), seeds[:3]) + runs(four, [5], seeds[:3], 'scattered')
longer = [config for n in (48, 64) for config in runs(['fcn'], [n], seeds[:3], steps=5000)]
starts = runs(four, [7], seeds[:3], relax=0, optimizer='adam', lr=.0003)
starts += runs(four, [7], seeds[:3], relax=0, optimizer='sgd', lr=.1)
starts += [config for seed in seeds[:3] for relax in (0, 300, 750)
           for config in runs(['efcn'], [7], [seed], relax=relax, optimizer='adam', lr=.001)]
digits, starts = ([dict(steps=1500) | config for config in configs] for configs in (digits, starts))
tasks = [('bits', learn_pattern, bits), ('longer', learn_pattern, longer),
         ('digits', learn_digits, digits), ('starts', learn_digits, starts)]
for name, learn, configs in tasks:
    ends = final_rows(sweep(learn, configs, folder=here/'efcn_runs', label=name))
    ends.round(5).to_csv(record/f'{name}.csv', index=False)
said = ', '.join(f'{k} {v}' for k, v in environment().items() if k != 'platform')
(record/'command.txt').write_text(f'python nbs/records/separation/record.py\n{said}, fp32\n')
