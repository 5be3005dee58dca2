"Made-up numbers of samples, for the tests of sample complexity and of claims about it."
import numpy as np
import pandas as pd


def power(exponents, sizes=(8, 16, 32), seeds=range(4), noise=.03):
    "A table of samples needed that grow as size**exponent, with some noise."
    draw = np.random.default_rng(0)
    return pd.DataFrame([dict(architecture=a, size=s, seed=seed, samples=5*s**p*draw.uniform(1, 1 + noise))
                         for a, p in exponents.items() for s in sizes for seed in seeds])
