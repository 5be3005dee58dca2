"Makes bits.csv, longer.csv, digits.csv and starts.csv beside this file: python nbs/records/separation/record.py"
from pathlib import Path

import torch

from efcn_nb.experiments.runs import environment
from efcn_nb.experiments.sweeps import sweep
from efcn_nb.studies.separation import final_rows, learn_digits, learn_pattern

torch.set_num_threads(1)
here, seeds = Path(__file__).parent, range(5)
bits = [dict(kind=kind, n=n, bits='consecutive', seed=seed) for seed in seeds for n in (16, 24, 32, 40, 48, 64, 96) for kind in ('cnn', 'lcn', 'wide', 'fcn', 'efcn')]
bits += [dict(kind=kind, n=128, bits='consecutive', seed=seed) for seed in seeds for kind in ('cnn', 'lcn', 'fcn', 'efcn')]
bits += [dict(kind=kind, n=n, bits='scattered', seed=seed) for seed in seeds for n in (16, 32, 48, 64) for kind in ('cnn', 'lcn', 'fcn', 'efcn')]
digits = [dict(kind=kind, n=n, bits='consecutive', seed=seed) for seed in seeds[:3] for n in (5, 7, 9) for kind in ('cnn', 'lcn', 'fcn', 'efcn')]
digits += [dict(kind=kind, n=5, bits='scattered', seed=seed) for seed in seeds[:3] for kind in ('cnn', 'lcn', 'fcn', 'efcn')]
longer = [dict(kind='fcn', n=n, bits='consecutive', seed=seed, steps=5000) for n in (48, 64) for seed in seeds[:3]]
starts = [dict(kind=kind, n=7, bits='consecutive', seed=seed, relax=0, **how) for how in (dict(optimizer='adam', lr=.0003), dict(optimizer='sgd', lr=.1)) for seed in seeds[:3] for kind in ('cnn', 'lcn', 'fcn', 'efcn')]
starts += [dict(kind='efcn', n=7, bits='consecutive', seed=seed, relax=relax, optimizer='adam', lr=.001) for seed in seeds[:3] for relax in (0, 300, 750)]
for name, learn, configs in [('bits', learn_pattern, bits), ('longer', learn_pattern, longer), *((name, learn_digits, [dict(steps=1500) | config for config in configs]) for name, configs in [('digits', digits), ('starts', starts)])]:
    final_rows(sweep(learn, configs, folder=here/'efcn_runs', label=name)).round(5).to_csv(here/f'{name}.csv', index=False)
(here/'command.txt').write_text('python nbs/records/separation/record.py\n' + ', '.join(f'{k} {v}' for k, v in environment().items() if k != 'platform') + ', fp32\n')
