"""Search for options.

Each trial is a run like any other, in a directory of its own, with values that Optuna proposes for some keys of the
recipe. A trial that falls behind the others is ended after an epoch. What decides is the validation split and nothing
else: a search that looks at test images would have chosen by them. All is kept in an SQLite file, so that a search that
was broken off goes on::

    runs/<recipe>.search/search.db     Optuna's study
                         trial-0/ ...  run directories
    <recipe>.best.yaml                 the recipe with the best values, beside the recipe, whose files it may name
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import attrs
from attrs import field

from trainkit.cli.output import add_allow_local, number, print_json, printable, table, terminal
from trainkit.errors import RecipeError, TrainkitError, UsageError, did_you_mean
from trainkit.plugin import hookimpl, plugin
from trainkit.recipe import load_recipe, read_yaml
from trainkit.rundir import atomic_write

if TYPE_CHECKING:
    import optuna

    from trainkit import Run

__all__ = ["SEARCH", "Pruning", "Space", "read_space"]

METRIC = "validation_accuracy"
KEYS = ("metric", "better", "trials", "seed", "space")
RANGE_KEYS = ("low", "high", "log", "step")
SHOWN = 10  # trials of the table


@attrs.frozen
class Space:
    """What is searched.

    Args:
        metric: what decides, of the validation split.
        better: whether ``more`` of it is better, or ``less``.
        trials: how many runs.
        seed: of Optuna's proposals.
        keys: for each key of the recipe a list of values, or a range: ``low``, ``high``, and perhaps ``log`` and
            ``step``.
    """

    metric: str
    better: Literal["more", "less"]
    trials: int
    seed: int
    keys: Mapping[str, Any]

    def propose(self, trial: optuna.Trial) -> dict[str, Any]:
        """Return a value for each key."""
        return {key: self._value(trial, key, what) for key, what in self.keys.items()}

    def _value(self, trial: optuna.Trial, key: str, what: Any) -> Any:
        if isinstance(what, list):
            return json.loads(str(trial.suggest_categorical(key, [json.dumps(value) for value in what])))
        low, high, step, log = what["low"], what["high"], what.get("step"), bool(what.get("log"))
        if isinstance(low, int) and isinstance(high, int):
            return trial.suggest_int(key, low, high, step=step or 1, log=log)
        return trial.suggest_float(key, low, high, step=step, log=log)


def read_space(path: Path) -> Space:
    """Read what is to be searched.

    Raises:
        UsageError: a key of it is wrong.
        RecipeError: the file cannot be read.
    """
    document = read_yaml(path, "space")
    if not isinstance(document.get("space"), dict) or not document["space"]:
        raise UsageError(f"{path}: expected a mapping with `space`, keys of the recipe and what they may be")
    for key in document:
        if key not in KEYS:
            raise UsageError(
                f"{path}: {key}: unknown key{did_you_mean(str(key), KEYS) or '; known: ' + ', '.join(KEYS)}"
            )
    metric, trials, seed = document.get("metric", METRIC), document.get("trials", 20), document.get("seed", 0)
    better = document.get("better", "more")
    if not isinstance(metric, str) or not metric.startswith("validation_"):
        raise UsageError(f"{path}: metric: {metric!r}: a search chooses by the validation split, such as {METRIC}")
    if better not in ("more", "less"):
        raise UsageError(f"{path}: better: expected more or less, got {better!r}")
    if not (_is_integer(trials) and _is_integer(seed) and trials > 0):
        raise UsageError(f"{path}: trials, seed: expected whole numbers, at least 1 trial, got {trials!r} and {seed!r}")
    for key, what in document["space"].items():
        _check_range(f"{path}: space.{key}", what)
    return Space(metric, better, trials, seed, document["space"])


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _check_range(place: str, what: Any) -> None:
    if isinstance(what, list):
        if len(what) < 2:
            raise UsageError(f"{place}: expected two values or more, got {what!r}")
        return
    if not isinstance(what, dict) or not {"low", "high"} <= what.keys() <= {*RANGE_KEYS}:
        raise UsageError(f"{place}: expected a list of values, or {{low: ..., high: ..., log: true}}, got {what!r}")
    numbers = [what[key] for key in ("low", "high", "step") if key in what]
    if not all(isinstance(value, int | float) and not isinstance(value, bool) for value in numbers):
        raise UsageError(f"{place}: low, high and step are numbers, got {what!r}")
    if not what["low"] < what["high"] or (what.get("log") and (what["low"] <= 0 or "step" in what)):
        raise UsageError(f"{place}: low must be less than high; with log: true greater than 0, and without a step")


@plugin
class Pruning:
    """End a trial that falls behind the others, after an epoch.

    Args:
        trial: Optuna's.
        metric: what decides.
        better: what the search takes for better.
    """

    trial: Any
    metric: str
    better: str
    pruned: bool = field(init=False, default=False)

    @hookimpl
    def epoch_end(self, run: Run, metrics: dict[str, float]) -> None:
        """Report the epoch, and end the run where Optuna says so.

        Raises:
            RecipeError: the metric says that it is better the other way.
        """
        if self.metric not in metrics:
            return
        said = run.metric_info[self.metric].better
        if said not in (None, self.better):
            raise RecipeError(f"of {self.metric!r} {said} is better; say `better: {said}` in the space")
        self.trial.report(metrics[self.metric], round(metrics["epoch"]))
        if self.trial.should_prune():
            self.pruned = True
            run.end(f"it falls behind the other trials in {self.metric}")


def _train(trial: optuna.Trial, recipe_path: Path, overrides: Sequence[str], space: Space, home: Path) -> float:
    """Train one trial and return the metric of its last epoch.

    Raises:
        UsageError: the recipe has no validation split, or nothing reports the metric.
        KeyboardInterrupt: it was asked to stop.
    """
    import optuna

    from trainkit.build import build
    from trainkit.session import fit

    chosen = [f"{key}={json.dumps(value)}" for key, value in space.propose(trial).items()]
    recipe = load_recipe(recipe_path, [*overrides, *chosen])
    folder = home / f"trial-{trial.number}"
    trial.set_user_attr("run", folder.name)
    pruning = Pruning(trial=trial, metric=space.metric, better=space.better)
    run = build(recipe, plugins={"pruning": pruning}, console=terminal(stderr=True))
    if run.data.validation is None:
        raise UsageError(
            f"{recipe_path}: a search chooses by the validation split, and the data have none; list a plugin that "
            "holds one out of the training images, such as hold_out"
        )
    result = fit(run, folder)
    if pruning.pruned:
        raise optuna.TrialPruned
    if not result.finished:  # it was asked to stop
        raise KeyboardInterrupt
    if space.metric not in result.final:
        near = did_you_mean(space.metric, result.final) or f"; reported are {', '.join(result.final)}"
        raise UsageError(f"metric: no plugin of {recipe_path} reports {space.metric!r}{near}")
    return result.final[space.metric]


def search(recipe_path: Path, overrides: Sequence[str], space: Space, home: Path) -> optuna.Study:
    """Run the trials that are missing.

    Args:
        recipe_path: the recipe.
        overrides: of each trial.
        space: what is searched.
        home: where all is kept.

    Raises:
        TrainkitError: a recipe is wrong, or no trial was completed.
    """
    import optuna
    from optuna.trial import TrialState

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    home.mkdir(parents=True, exist_ok=True)
    study = optuna.create_study(
        storage=f"sqlite:///{home / 'search.db'}",
        study_name="search",
        direction="maximize" if space.better == "more" else "minimize",
        sampler=optuna.samplers.TPESampler(seed=space.seed),
        pruner=optuna.pruners.MedianPruner(n_startup_trials=3, n_warmup_steps=1),
        load_if_exists=True,
    )
    for broken in study.get_trials(states=(TrialState.RUNNING,)):  # was broken off, so its values are tried again
        study.tell(broken.number, state=TrialState.FAIL)
        shutil.rmtree(home / f"trial-{broken.number}", ignore_errors=True)
        study.enqueue_trial(broken.params)
    while True:
        ended = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED))
        if len(ended) >= space.trials:
            return study
        trial = study.ask()
        out = terminal(stderr=True)
        out.print(f"trial {trial.number}, {len(ended)} of {space.trials} done", markup=False, highlight=False)
        try:
            study.tell(trial, _train(trial, recipe_path, overrides, space, home))
        except optuna.TrialPruned:
            study.tell(trial, state=TrialState.PRUNED)
        except (UsageError, RecipeError):
            study.tell(trial, state=TrialState.FAIL)
            raise
        except TrainkitError as problem:  # such as a loss that is not finite: these values are of no use
            out.print(printable(f"trial {trial.number} failed: {problem}"), markup=False, soft_wrap=True)
            study.tell(trial, state=TrialState.PRUNED)


def _rows(study: optuna.Study) -> list[list[str]]:
    """Return the best trials: number, value, state, and what was tried."""
    from optuna.trial import TrialState

    ended = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED))
    sign = -1 if study.direction.name == "MAXIMIZE" else 1
    key = lambda trial: (trial.state != TrialState.COMPLETE, sign * (trial.value or 0.0))  # noqa: E731
    return [
        [
            str(trial.number),
            number(trial.value) if trial.state == TrialState.COMPLETE else "-",
            "completed" if trial.state == TrialState.COMPLETE else "ended early",
            ", ".join(f"{name}={_shown(value)}" for name, value in trial.params.items()),
        ]
        for trial in sorted(ended, key=key)
    ]


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else f"{value:.4g}"


class _Search:
    """``trainkit search``."""

    HELP = "Search for options with Optuna, by the validation split, and write the best ones as a recipe."
    EXAMPLES = """\
examples:
  trainkit search photos.yaml space.yaml
  trainkit search photos.yaml space.yaml epochs=10 --trials 50 -o runs/wide
"""

    @staticmethod
    def add_arguments(parser: argparse.ArgumentParser) -> None:
        """Declare the command's arguments."""
        parser.add_argument("recipe", type=Path, help="a recipe file")
        parser.add_argument("space", type=Path, metavar="SPACE", help="a YAML file: see the plugin's README")
        parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="replace one value of the recipe")
        parser.add_argument("--trials", type=int, metavar="N", help="so many in all, in place of the file's")
        parser.add_argument("-o", "--output", type=Path, metavar="DIR", help="default: runs/<recipe>.search")
        parser.add_argument("--json", action="store_true", help="print JSON")
        add_allow_local(parser)

    @staticmethod
    def run(args: argparse.Namespace) -> int:
        """Run the trials that are missing, print the best, and write them as a recipe."""
        space = read_space(args.space)
        if args.trials is not None:
            space = attrs.evolve(space, trials=args.trials)
        recipe = load_recipe(args.recipe, args.overrides)
        home = args.output or Path("runs") / f"{recipe.name}.search"
        study = search(args.recipe, args.overrides, space, home)
        try:
            best = study.best_trial
        except ValueError as problem:
            raise UsageError(f"{home}: no trial was completed; search a smaller space, or more trials") from problem
        chosen = [f"{key}={json.dumps(value)}" for key, value in _values(space, best.params).items()]
        found = attrs.evolve(load_recipe(args.recipe, [*args.overrides, *chosen]), name=f"{recipe.name}_best")
        path = args.recipe.with_name(f"{args.recipe.stem}.best.yaml")
        try:
            atomic_write(path, found.to_yaml())
        except OSError as problem:
            raise UsageError(f"{path}: cannot be written: {problem.strerror}") from problem
        rows = _rows(study)
        if args.json:
            print_json(
                {"best": best.params, "value": best.value, "metric": space.metric, "recipe": str(path), "trials": rows}
            )
            return 0
        out = terminal()
        made = table(["trial", space.metric, "", "values"], rows[:SHOWN], right=["trial", space.metric])
        out.print(made)
        out.print(printable(path), markup=False, highlight=False, soft_wrap=True)
        return 0


def _values(space: Space, params: Mapping[str, Any]) -> dict[str, Any]:
    """Return Optuna's values as the recipe has them."""
    return {key: json.loads(value) if isinstance(space.keys[key], list) else value for key, value in params.items()}


SEARCH = _Search
