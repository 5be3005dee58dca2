"""The names that the package offers, for editors and type checkers; see __init__.py."""
from .ladder.embedding import (
    convert as convert, embed as embed, nearest_cnn as nearest_cnn, reinitialize as reinitialize)
from .ladder.folding import merge_batchnorm as merge_batchnorm
from .ladder.inspection import conv_geometries as conv_geometries
from .ladder.layers import FullyConnected as FullyConnected, LocallyConnected as LocallyConnected
from .ladder.costs import embedding_costs as embedding_costs
from .materials.data import Data as Data, Dataset as Dataset, load_data as load_data, load_samples as load_samples
from .materials.models import make_model as make_model
from .training.fused import FusedSGD as FusedSGD
from .training.loop import evaluate as evaluate, train as train
from .instruments.subspaces import (
    ablate as ablate, ablation as ablation, dimensions as dimensions, project as project, shares as shares)
from .instruments.paths import barrier_matrix as barrier_matrix
from .instruments.curvature import loss_slice as loss_slice
from .experiments.effects import show_claims as show_claims
from .experiments.relaxation import read_protocol as read_protocol, relax as relax, Study as Study
from .experiments.claims import (
    choose_rates as choose_rates, claim_intervals as claim_intervals, claims as claims, final_values as final_values,
    gains as gains, summary as summary)
from .experiments.measures import measured as measured
from .experiments.plots import (
    plot_ablation as plot_ablation, plot_accuracy_deviation as plot_accuracy_deviation, plot_claims as plot_claims,
    plot_curve_panels as plot_curve_panels, plot_curves as plot_curves, plot_deviation as plot_deviation,
    plot_gains as plot_gains, plot_matrix as plot_matrix, plot_parts as plot_parts, plot_paths as plot_paths,
    plot_profile as plot_profile, plot_relax_times as plot_relax_times, plot_rows as plot_rows,
    plot_sharpness as plot_sharpness, plot_slice as plot_slice, plot_study as plot_study, set_style as set_style)

__version__: str
