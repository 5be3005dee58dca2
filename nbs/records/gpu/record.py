"""The protocol at paper size on a GPU, within a time that is given.

    python nbs/records/gpu/record.py --minutes 9 --data FOLDER --out DIR

FOLDER holds train/CLASS/* and test/CLASS/* of CIFAR-10 as images, or an archive of such a tree. Blocks that DIR holds
already are not computed again. DIR receives, after every stage, at most eight small files:

    environment.json  card, driver, versions, commands
    checks.csv        errors against float64 on this device
    ladder.csv        milliseconds a step, from the package's own step to the captured one, with the machine's ceilings
    curves.csv        accuracies (train: running mean over an epoch; validation; test), a line an evaluation
    norms.csv         where each relaxed network went: norms of its weights and of its displacement, by part
    outcomes.csv      mean of the last five evaluations, with its spread over seeds, and the paired gains

A step is that of `efcn_nb.training.graphs`, captured as a CUDA graph: bf16 products on fp32 weights, the update of a
matrix within the backward pass. `--device cpu` computes the same without a graph, `--toy` at a size for tests.

A machine needs torch, torchvision, what the package imports (fastcore and tensorly as wheels on PYTHONPATH), and
neither nbdev nor a network. Before a record, the tests that are written for such a machine:

    python -m pytest --noconftest -q tests/test_cuda.py
"""

import argparse, copy, io, json, math, os, subprocess, sys, tarfile, time, traceback
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))
from efcn_nb.experiments.bench import ceilings, ladder_jobs, noise, rung
from efcn_nb.experiments.effects import interval, verdict
from efcn_nb.instruments.subspaces import squares
from efcn_nb.ladder.matrices import (
    kernel_from_local, local_from_kernel, local_from_matrix, matrix_from_kernel, release, tied_sum)
from efcn_nb.ladder.inspection import conv_geometries
from efcn_nb.ladder.embedding import embed, nearest_cnn, reinitialize
from efcn_nb.training.fused import FusedSGD
from efcn_nb.training.graphs import Group, Trainer, normalised
from efcn_nb.ladder.layers import FullyConnected
from efcn_nb.materials.data import Dataset
from efcn_nb.materials.models import alexnet, skinny

MEAN, STD = (0.491, 0.482, 0.447), (0.247, 0.243, 0.262)
LAST, EVERY = 5, 20  # evaluations at the end that make the outcome, and epochs between earlier ones


# A block is one size of data and network. At `times` (epochs) the CNN is relaxed or annealed, to one of `rates`.
def block(name, n, arms, times=(), rates=(0.02,), width=64, seeds=8, group=8):
    "One line of the plan; `group` seeds are trained at once, batches are 250 where there are enough images."
    return dict(
        block=name,
        n=n,
        width=width,
        batch=250 if n > 16_000 else 50,
        epochs=120,
        times=list(times),
        rates=list(rates),
        arms=arms,
        seeds=seeds,
        group=group,
    )


CNNS, ALL = ["annealed"], ["annealed", "slowed", "efcn"]
BLOCKS = [
    block("paper", 45_000, ALL, [18]),
    block("4,000", 4_000, ALL, [0, 5, 10, 20, 40]),
    block("1,000", 1_000, ALL, [0, 10, 20, 40]),
    block("4,000, width 128", 4_000, CNNS, [20], width=128),
    block("4,000, width 256", 4_000, CNNS, [20], width=256),
    block("paper, times", 45_000, ALL, [5, 78], seeds=4, group=4),
    block("paper, FCN", 45_000, ["fcn"], rates=[0.1], seeds=4, group=4),
    block("paper, width 128", 45_000, CNNS, [18], width=128, seeds=4, group=4),
    block("4,000, FCN", 4_000, ["fcn"], rates=[0.1, 0.02]),
    block("4,000, rates", 4_000, ["annealed", "efcn"], [20], [0.1, 0.05, 0.01]),
    block("paper, rates", 45_000, ["annealed", "efcn"], [18], [0.1, 0.005], seeds=4, group=4),
    block("16,000", 16_000, ALL, [10, 20], seeds=4, group=4),
    block("4,000, relaxed at width 128", 4_000, ALL, [20], width=128, group=4),
]
SMALL = dict(n=200, width=4, epochs=8, batch=50, seeds=2, group=2)
TOY = [block("toy", 0, ALL, [0, 2]) | SMALL, block("toy, FCN", 0, ["fcn"], rates=[0.1]) | SMALL]


class OutOfTime(Exception):
    "The time that was given is used up."


class Clock:
    def __init__(self, minutes):
        self.end = time.time() + 60 * minutes

    def left(self):
        return self.end - time.time()

    def check(self):
        if self.left() < 0:
            raise OutOfTime


# Images


def decode(raw):
    return np.asarray(Image.open(io.BytesIO(raw)).convert("RGB")).transpose(2, 0, 1)


def decode_many(raws):
    return np.stack([decode(raw) for raw in raws])


def read_files(folder):
    "{name: bytes} of all images of a tree, or of the archive that lies in `folder`."
    archives = sorted(Path(folder).glob("*.tar*"))
    if archives:
        with tarfile.open(archives[0]) as tar:
            return {m.name: tar.extractfile(m).read() for m in tar if m.isfile()}
    return {
        str(p.relative_to(folder)): p.read_bytes()
        for p in sorted(Path(folder).rglob("*.*"))
        if p.suffix.lower() in (".jpg", ".jpeg", ".png")
    }


def read_images(folder):
    "Images as bytes and labels, {'train': (x, y), 'test': (x, y)}."
    files, found = read_files(folder), {}
    for split in ("train", "test"):
        names = sorted(n for n in files if Path(n).parts[-3] == split)
        classes = sorted({Path(n).parts[-2] for n in names})
        parts = [[files[n] for n in names[i : i + 1000]] for i in range(0, len(names), 1000)]
        with ProcessPoolExecutor(os.cpu_count()) as pool:
            x = np.concatenate(list(pool.map(decode_many, parts)))
        found[split] = torch.from_numpy(x), torch.tensor([classes.index(Path(n).parts[-2]) for n in names])
    return found


def noise_images():
    "Images for tests: noise with a bright corner that tells the class."
    g, found = torch.Generator().manual_seed(0), {}
    for split, n in (("train", 600), ("test", 200)):
        y = torch.arange(n) % 10
        x = torch.randint(0, 100, (n, 3, 32, 32), dtype=torch.uint8, generator=g)
        x[torch.arange(n), :, 3 * y, :3] = 255
        found[split] = x, y
    return found


def dataset(x, y):
    "Images as bytes on the device, with CIFAR-10's moments."
    mean, std = (torch.tensor(v, device=x.device) for v in (MEAN, STD))
    return Dataset(x, y, [str(c) for c in range(10)], mean, std, "CIFAR-10")


def parts(images, n, seed):
    "Images of a block, {'train', 'validation', 'test'}: each seed has its own for training and validation."
    x, y = images["train"]
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(10_000 + seed)).to(x.device)
    rows = dict(train=order[:n], validation=order[-max(n // 10, min(5000, len(order) - n)) :])
    return {k: dataset(x[r], y[r]) for k, r in rows.items()} | {"test": dataset(*images["test"])}


# One step: training.graphs of the package


def copies(geometries, device):
    "By name, how many copies each weight and bias of a convolution has in its matrix: so much smaller are tied steps."
    found = {}
    for name, g in geometries.items():
        found[name + ".weight"] = tied_sum(matrix_from_kernel(torch.ones(g.kernel_shape, device=device), g), g).clamp(
            min=1
        )
        found[name + ".bias"] = torch.full((g.out_channels,), float(math.prod(g.output_size)), device=device)
    return found


def measured(group, epoch):
    "What the last epoch gave, a line for each network."
    return [dict(t.tags, seed=t.seed, epoch=epoch, **found) for t, found in zip(group.trainers, group.measured())]


def train(trainers, first, last, clock, rows, graph):
    "All `trainers` from epoch `first` to `last`; measurements go to `rows`. Returns the group, which can go on."
    group = trainers if isinstance(trainers, Group) else Group(trainers, graph)
    for epoch in range(first + 1, last + 1):
        clock.check()
        group.epoch(epoch)
        if epoch % EVERY == 0 or epoch > last - LAST:
            rows += measured(group, epoch)
    return group


# Where a network went


@torch.no_grad()
def parts_of(W, g):
    "Squared norms of the convolutional, the unshared and the off-local part of a matrix."
    inside = torch.zeros(math.prod(g.output_size), math.prod(g.input_size) + 1, dtype=torch.bool, device=W.device)
    reads = g.reads.to(W.device)
    inside.scatter_(1, reads.where(reads >= 0, inside.shape[1] - 1), True)
    square = lambda x: float(torch.linalg.vector_norm(x, dtype=torch.float64) ** 2)
    off = W.view(g.out_channels, len(inside), g.in_channels, -1).masked_fill(inside[None, :, None, :-1], 0)
    local = local_from_matrix(W, g)
    shared = local_from_kernel(kernel_from_local(local, g), g)
    return dict(convolutional=square(shared), unshared=square(local - shared), off_local=square(off))


def norms(trainer):
    "Squared norms of weights and displacement by part, summed over layers."
    found = dict(trainer.tags, seed=trainer.seed)
    for what, of in (("weights", lambda d, start: d.weight), ("displacement", lambda d, start: d.weight - start)):
        total = {}
        for d, start in zip(trainer.dense, trainer.start):
            for part, square in parts_of(of(d, start), d.geometry).items():
                total[part] = total.get(part, 0.0) + square
        found |= {f"{what}_{part}": square for part, square in total.items()}
    return found


# Blocks


def released(cnn, geometries):
    "The eFCN of `cnn`, whose geometries are known."
    return copy.deepcopy(
        cnn, {id(m): release(m, geometries[name]) for name, m in cnn.named_modules() if name in geometries}
    )


def unit(b, seeds, images, device, graph, clock, rows, places):
    "All networks of block `b` for these seeds: the CNNs, then from each of `times` what goes on from there."
    new = []
    found = {s: parts(images, b["n"], s) for s in seeds}
    tags = {k: b[k] for k in ("block", "n", "width")}

    def cnn(seed):
        torch.manual_seed(seed)
        return skinny((3, 32, 32), 10, b["width"]).to(device)

    geometries = conv_geometries(cnn(0), (3, 32, 32), trim=True)

    def made(model, s, network, relax, lr, slow=None):
        own, held_out = found[s]["train"], {k: found[s][k] for k in ("validation", "test")}
        trainer = Trainer(model, own, lr, b["batch"], s, slow=slow, held_out=held_out)
        trainer.tags = dict(tags, network=network, relax=relax, lr=lr)
        return trainer

    if "fcn" in b["arms"]:
        for lr in b["rates"]:
            group = [
                made(reinitialize(released(cnn(s), geometries), seed=1_000 + s, inplace=True), s, "fcn", None, lr)
                for s in seeds
            ]
            train(group, 0, b["epochs"], clock, new, graph)
            rows += new
            new.clear()
        return
    trainers, states, past = [made(cnn(s), s, "cnn", None, 0.1) for s in seeds], {}, 0
    group = Group(trainers, graph)
    slow = copies(geometries, device)
    for t in sorted({*b["times"], b["epochs"]}):
        train(group, past, t, clock, new, graph)
        states[t], past = [{k: v.clone() for k, v in g.model.state_dict().items()} for g in trainers], t
    new[:] = [r for r in new if r["epoch"] % EVERY == 0 or r["epoch"] > b["epochs"] - LAST]
    rows += new
    del group, trainers
    for t in b["times"]:
        for lr in b["rates"]:
            new, group = [], []
            for arm in b["arms"]:
                for s, state in zip(seeds, states[t]):
                    model = cnn(s)
                    model.load_state_dict(state)
                    if arm == "efcn":
                        model = released(model, geometries)
                    # the slowed CNN takes the steps of the eFCN, tied: same rate, divided by copies
                    group.append(made(model, s, arm, t, lr, slow if arm == "slowed" else None))
                    group[-1].start = [d.weight.clone() for d in group[-1].dense]
            train(group, t, b["epochs"], clock, new, graph)
            rows += new
            places += [norms(g) for g in group if g.dense]
            del group


def outcomes(curves):
    "Mean of the last evaluations of each network, and what each gains over the CNNs of the same seed."
    keys, tables = ["block", "n", "width", "network", "relax", "lr"], []
    table = curves.copy()
    table["relax"], chance = table.relax.fillna(-1), 0.1
    table.loc[~np.isfinite(table.train_loss), ["validation", "test"]] = chance  # a run that diverged is at chance
    last = table[table.epoch > table.groupby("block").epoch.transform("max") - LAST]
    last = last.groupby([*keys, "seed"])[["train", "validation", "test"]].mean().reset_index()
    for key, mine in last.groupby(keys):
        row, mine, same = dict(zip(keys, key)), mine.set_index("seed").test, last[last.block == key[0]]
        of = lambda **kw: same[np.logical_and.reduce([same[k] == v for k, v in kw.items()])].set_index("seed").test
        row |= dict(
            seeds=len(mine),
            test=mine.mean(),
            spread=mine.std(),
            train=last[(last[keys] == list(key)).all(axis=1)].train.mean(),
        )
        of_all_epochs = table[(table[keys] == list(key)).all(axis=1)]
        row["diverged"] = of_all_epochs[~np.isfinite(of_all_epochs.train_loss)].seed.nunique()
        rivals = dict(cnn=of(network="cnn"))
        if row["relax"] >= 0:
            rivals |= {k: of(network=k, relax=row["relax"], lr=row["lr"]) for k in ("annealed", "slowed")}
            rivals["best_rival"] = (
                pd.concat([rivals["annealed"], rivals["slowed"]], axis=1).max(axis=1)
                if len(rivals["slowed"])
                else rivals["annealed"]
            )
        for name, rival in rivals.items():
            if name == row["network"] or not len(rival) or name == "best_rival" and row["network"] != "efcn":
                continue
            mean, _, half = interval((mine - rival).dropna())
            row |= {f"gain_{name}": mean, f"half_{name}": half, f"verdict_{name}": verdict(mean - half, mean + half)}
        tables.append(row)
    return pd.DataFrame(tables).replace({"relax": {-1: np.nan}})


# What the step costs, and whether it is right


def reference(model, x, y, lr, dtype, amp=False):
    "Weights after one plain step of SGD computed in `dtype`."
    model = copy.deepcopy(model).to(dtype)
    with torch.autocast(x.device.type, torch.bfloat16, enabled=amp, cache_enabled=False):
        out = model(x.to(dtype))
    F.cross_entropy(out.to(torch.promote_types(out.dtype, torch.float32)), y).backward()
    return {n: -lr * p.grad for n, p in model.named_parameters()}


def checks(device, graph, toy):
    "Errors against float64: the embedding, and the steps of each kind as relative errors of what they move."
    torch.manual_seed(0)
    cnn = skinny((3, 32, 32), 10, 4 if toy else 64).to(device)
    images = {
        k: (
            torch.randint(0, 256, (50, 3, 32, 32), dtype=torch.uint8, device=device),
            torch.randint(0, 10, (50,), device=device),
        )
        for k in ("train", "test")
    }
    data = dataset(*images["train"])
    found, x = [], normalised(data.x, data, torch.bfloat16).double()
    error = lambda a, b: float(
        torch.linalg.vector_norm((a - b).detach().flatten(), dtype=torch.float64)
        / torch.linalg.vector_norm(b.detach().flatten())
    )

    def note(what, value):
        found.append(dict(check=what, relative_error=value))

    double = copy.deepcopy(cnn).double()
    for trim in (False, True):
        efcn = embed(double, (3, 32, 32), trim=trim)
        note(f"embedding, float64, trim={trim}", error(efcn(x), double(x)))
        note(f"way back, trim={trim}", error(nearest_cnn(efcn)[0].weight, double[0].weight))
    elcn = embed(double, (3, 32, 32), to="lcn")
    note("embedding in eLCN, float64", error(elcn(x), double(x)))
    efcn = embed(cnn, (3, 32, 32), trim=True)
    true = reference(efcn, x, images["train"][1], 0.1, torch.float64)
    plain = reference(efcn, x.float(), images["train"][1], 0.1, torch.float32, amp=True)
    for n in true:
        note(f"PyTorch's bf16 gradient of {n}", error(plain[n], true[n]))
    fused, before = copy.deepcopy(efcn), {n: p.detach().clone() for n, p in efcn.named_parameters()}
    optimizer = FusedSGD(fused, 0.1)
    with torch.autocast(device.type, torch.bfloat16, cache_enabled=False):
        out = fused(x.float())
    F.cross_entropy(out.float(), images["train"][1]).backward()
    optimizer.step()
    for n, p in fused.named_parameters():
        note(f"FusedSGD, bf16, {n}", error(p.detach() - before[n], true[n]))
    for captured in {False, graph}:
        group = Group([Trainer(copy.deepcopy(m), data, 0.1, 50) for m in (cnn, efcn, efcn)], captured)
        group.epoch(1)
        moved = {n: p.detach() for n, p in group.trainers[2].model.named_parameters()}
        for n in true:
            note(f"{'captured' if captured else 'eager'} step, bf16, {n}", error(moved[n] - before[n], true[n]))
    return pd.DataFrame(found)


def ladder(device, graph, toy, clock):
    "Milliseconds of a step of 250 images: the ladder of `experiments.bench`, and the ceilings of the machine."
    found, batch, repeat = [], 50 if toy else 250, 3 if toy else 20
    size, side = (2**20, 512) if toy else (2**30, 8192)

    def add(network, what, make, steps=1, repeat=repeat):
        clock.check()
        seconds, said = rung(make, steps, device, repeat)
        found.append(dict(network=network, what=f"{what}: {said}" if said else what, milliseconds=1e3 * seconds))

    for what, (job, _) in ceilings(device, size, side).items():
        add("ceiling", what, lambda: job)
    data = noise(4 * batch, device).train
    for name, make in (("SkinnyCNN", skinny), ("AlexNet", alexnet)):
        torch.manual_seed(0)
        cnn = make((3, 32, 32), 10, 4 if toy else 64).to(device)
        start = time.perf_counter()
        efcn = embed(cnn, (3, 32, 32), trim=True)
        found.append(dict(network=name, what="embed, trimmed", milliseconds=1e3 * (time.perf_counter() - start)))
        for what, (job, steps) in ladder_jobs(efcn, cnn, data, batch, graph).items():
            add(name, what, job, steps)
        layer = next(m for m in efcn.modules() if isinstance(m, FullyConnected))
        add(name, "norms by part, first layer", lambda: lambda: squares(layer), repeat=3)
    return pd.DataFrame(found)


# The script


def environment(device, args):
    found = dict(
        date=time.strftime("%Y-%m-%d"),
        python=sys.version.split()[0],
        torch=torch.__version__,
        command=" ".join(["python", "nbs/records/gpu/record.py", *args]),
    )
    if device.type == "cuda":
        found |= dict(
            device=torch.cuda.get_device_name(), cuda=torch.version.cuda, cudnn=torch.backends.cudnn.version()
        )
        asked = subprocess.run(
            ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"], capture_output=True, text=True
        )
        found["driver"] = asked.stdout.strip()
    return found


def publish(path, write):
    "`write` a file beside `path` and put it there in one step: who is killed leaves the earlier one."
    part = path.with_name(path.name + ".part")
    write(part)
    os.replace(part, path)


def save(table, path):
    publish(path, lambda part: table.to_csv(part, index=False, float_format="%.5g"))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=9)
    parser.add_argument("--data", help="folder of images, or of their archive; not needed with --toy")
    parser.add_argument("--out", required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--blocks", nargs="*", help="only these")
    parser.add_argument("--toy", action="store_true")
    parser.add_argument("--no-graph", action="store_true")
    args = parser.parse_args()
    clock, device, out = Clock(args.minutes), torch.device(args.device), Path(args.out)
    graph = device.type == "cuda" and not args.no_graph
    out.mkdir(parents=True, exist_ok=True)
    start = time.time()
    found = noise_images() if args.toy else read_images(args.data)
    print(f"images: {time.time() - start:.1f} s, {[tuple(x.shape) for x, _ in found.values()]}", flush=True)
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
        torch.backends.cudnn.benchmark = True
    path = out / "environment.json"
    known = json.loads(path.read_text()) if path.exists() else []
    text = json.dumps([*known, environment(device, sys.argv[1:])], indent=1)
    publish(path, lambda part: part.write_text(text))
    print("steps:", "some of all networks a graph" if graph else f"one by one, on {device}", flush=True)

    for name, stage in (
        ("checks", lambda: checks(device, graph, args.toy)),
        ("ladder", lambda: ladder(device, graph, args.toy, clock)),
    ):
        if (out / f"{name}.csv").exists():
            continue
        start = time.time()
        try:
            table = stage()
        except OutOfTime:
            break
        except Exception:
            print(f"{name} failed\n{traceback.format_exc()}", flush=True)
            if name == "checks":
                sys.exit("without a right step nothing is trained; --no-graph computes step by step")
            continue
        save(table, out / f"{name}.csv")
        print(f"{name}: {time.time() - start:.1f} s\n{table.to_string(index=False)}", flush=True)

    images = {k: (x.to(device), y.to(device)) for k, (x, y) in found.items()}
    curves, places, done = [
        pd.read_csv(out / f"{n}.csv").to_dict("records") if (out / f"{n}.csv").exists() else []
        for n in ("curves", "norms")
    ] + [out / "done.json"]
    finished, took = (json.loads(done.read_text()) if done.exists() else []), {}
    for b in TOY if args.toy else BLOCKS:
        if args.blocks and b["block"] not in args.blocks:
            continue
        for first in range(0, b["seeds"], b["group"]):
            seeds = list(range(first, min(first + b["group"], b["seeds"])))
            if [b["block"], seeds] in finished or clock.left() < max(15, 1.1 * took.get(b["block"], 0)):
                continue
            curves = [r for r in curves if not (r["block"] == b["block"] and r["seed"] in seeds)]
            places = [r for r in places if not (r["block"] == b["block"] and r["seed"] in seeds)]
            start, ended = time.time(), "done"
            try:
                unit(b, seeds, images, device, graph, clock, curves, places)
            except OutOfTime:
                ended = "out of time"
            except Exception:
                ended = traceback.format_exc()
            if ended == "done":
                finished.append([b["block"], seeds])
                took[b["block"]] = time.time() - start
            print(
                f"{b['block']}, seeds {seeds}: {ended}, {time.time() - start:.1f} s, {clock.left():.0f} s left",
                flush=True,
            )
            if not curves:
                continue
            save(pd.DataFrame(curves), out / "curves.csv")
            if places:
                save(pd.DataFrame(places), out / "norms.csv")
            save(outcomes(pd.DataFrame(curves)), out / "outcomes.csv")
            publish(done, lambda part: part.write_text(json.dumps(finished)))
    if curves:
        shown = outcomes(pd.DataFrame(curves))
        print(shown[[c for c in shown if not c.startswith("verdict") and True]].round(4).to_string(index=False))


if __name__ == "__main__":
    main()
