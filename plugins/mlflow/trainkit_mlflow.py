"""Records for MLflow."""

from __future__ import annotations

import json
import logging
import math
import os
import re
import sqlite3
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from time import monotonic, time
from typing import TYPE_CHECKING, Any, ClassVar
from urllib.parse import quote, unquote, urlsplit

import attrs
from attrs import field
from attrs.validators import matches_re, optional

import trainkit
from trainkit import Result, Run
from trainkit.cli.output import printable
from trainkit.errors import RecipeError, RunError, TrainkitError
from trainkit.plugin import hookimpl, plugin
from trainkit.rundir import RunDir, as_mapping

if TYPE_CHECKING:
    from mlflow import MlflowClient

__all__ = ["MLflow"]

# Without a handler, Python would print on the terminal what MLflow logs of a failure that is warned of here.
logging.getLogger("mlflow").addHandler(logging.NullHandler())

FILE = "mlflow.json"  # in the run directory: the id of the run in MLflow
DATABASE, ARTIFACTS = "mlflow.db", "mlartifacts"  # of the default store, beside the runs
POSITION = ("epoch", "step")  # of a record; all else in it is a value
WRITE_EVERY = 50  # values that wait are written together
MAX_BATCH = 1000  # values, MLflow's limit for a request
MAX_PARAMS = 100  # MLflow's limit for a request
MAX_PARAM, MAX_TAG = 6000, 8000  # characters, MLflow's limits
MAX_WAITING = 100_000  # values that are kept for a store that cannot be reached
RETRY_AFTER = 300.0  # seconds; a server that never answers costs a training 10 of so many
LARGEST = sys.float_info.max  # MLflow's SQL stores keep infinity as this

# What MLflow reads from the environment, while it is called. Its own defaults would wait for a lost server for minutes.
FIXED = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_CONFIGURE_LOGGING": "false",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",  # which --json has for its own
}
DEFAULTS = {"MLFLOW_HTTP_REQUEST_TIMEOUT": "10", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}
CREDENTIALS = (
    "MLFLOW_TRACKING_TOKEN",
    "MLFLOW_TRACKING_USERNAME",
    "MLFLOW_TRACKING_PASSWORD",
    "MLFLOW_TRACKING_AUTH",
    "MLFLOW_TRACKING_AWS_SIGV4",
    "MLFLOW_TRACKING_CLIENT_CERT_PATH",
)


def _is_tracking_uri(_: object, attribute: attrs.Attribute[Any], value: str) -> None:
    """Check an option that names a store.

    Raises:
        ValueError: it is none, or holds a password, which every record of the run would show.
    """
    parts = urlsplit(value)
    is_file = value.startswith("sqlite:///") and len(value) > len("sqlite:///") and not parts.query
    is_server = parts.scheme in ("http", "https") and bool(parts.hostname)
    if not is_file and not is_server:
        raise ValueError(f"{attribute.name!r} must be http://HOST:PORT, https://HOST or sqlite:///FILE, not {value!r}")
    if "@" in parts.netloc:
        raise ValueError(
            f"{attribute.name!r} holds a user's name, and a recipe is recorded; set MLFLOW_TRACKING_USERNAME and "
            "MLFLOW_TRACKING_PASSWORD, and MLFLOW_TRACKING_URI to this address without them"
        )


@plugin
class MLflow:
    """Write a run's records, recipe and result to MLflow.

    A value is a metric of the same name; the steps are optimizer steps. The recipe's values are params, and the run's
    result is the status. Records are written at the end of an epoch, and whenever 50 values wait. A dry run writes
    nothing, and MLflow's telemetry is off.

    A run that is resumed continues its run in MLflow. Steps that it repeats, because its checkpoint lies before them,
    are there once where they have the same values. MLflow can take nothing back: where a value differs, both are there,
    the later one in time is the run's, and the tag ``trainkit.resumed`` tells from which steps on that may be.

    A store that cannot be reached at the start is an error. Later it is a warning: values wait, up to 100,000, and are
    tried again every five minutes and at the end.

    Args:
        experiment: the experiment in MLflow; by default the recipe's name.
        tracking_uri: the store, ``http://HOST:PORT`` or ``sqlite:///FILE``, relative to the current folder; by default
            ``mlflow.db`` in the nearest folder ``runs`` that the run directory lies in, else beside the run directory.
        artifacts: keep recipe.yaml, result.json and the figures in MLflow, too; beside an SQLite file, in
            ``mlartifacts``.
    """

    observer: ClassVar = True

    experiment: str | None = field(default=None, validator=optional(matches_re(r"[^/\x00-\x1f][^\x00-\x1f]{0,499}")))
    tracking_uri: str | None = field(default=None, validator=optional(_is_tracking_uri))
    artifacts: bool = True
    _uri: str = field(init=False, default="")
    _client: MlflowClient | None = field(init=False, default=None)
    _run_id: str = field(init=False, default="")
    _waiting: list[tuple[str, float, int, int]] = field(init=False, factory=list)  # name, value, time in ms, step
    _dropped: int = field(init=False, default=0)  # values that waited for too long
    _repeated: dict[tuple[str, int], float] = field(init=False, factory=dict)  # what MLflow has from here on
    _retry_at: float | None = field(init=False, default=None)  # while the store cannot be reached

    @hookimpl
    def fit_start(self, run: Run) -> None:
        """Begin a run in MLflow, or continue the one that the run directory names.

        Raises:
            RecipeError: the store is no file of MLflow, or a server that the user's credentials are not meant for.
            RunError: the store cannot be reached, or refuses the run.
        """
        if run.dry:
            return
        assert run.dir is not None
        self._uri = self.tracking_uri or f"sqlite:///{(_home(run.dir) / DATABASE).as_posix()}"
        self._waiting, self._dropped, self._repeated, self._retry_at = [], 0, {}, None
        if (path := _database(self._uri)) is not None:
            _refuse_other_file(path, f"{run.recipe.where}: plugins.mlflow.tracking_uri")
        else:
            _refuse_credentials(self._uri, f"{run.recipe.where}: plugins.mlflow.tracking_uri")
        try:
            with _settings():
                self._open(run, run.dir)
        except TrainkitError:
            raise
        except Exception as error:
            raise RunError(
                f"{self._uri}: MLflow's store cannot be used: {_line(error)}; see to it, name another one with "
                "plugins.mlflow.tracking_uri, or train without it: plugins.mlflow=false"
            ) from error

    @hookimpl
    def log(self, run: Run, record: dict[str, float]) -> None:
        """Take a record, and write all that wait at the end of an epoch or when they are many."""
        if self._client is None:
            return
        now, step = int(time() * 1000), int(record["step"])
        for name, value in record.items():
            key = _key(name)
            if name not in POSITION and not _is_same(self._repeated.get((key, step)), value):
                self._waiting.append((key, float(value), now, step))
        is_whole_epoch = bool(run.history) and record is run.history[-1]
        if (is_whole_epoch or len(self._waiting) >= WRITE_EVERY) and monotonic() >= (self._retry_at or 0.0):
            self._write(run)
        elif (excess := len(self._waiting) - MAX_WAITING) > 0:
            del self._waiting[:excess]
            self._dropped += excess

    @hookimpl
    def result_written(self, run: Run, result: Result) -> None:
        """Write what still waits, artifacts and status, after a stop or a failure too."""
        if self._client is None:
            return
        client = self._client
        self._write(run)
        if self.artifacts:
            self._reach(run, partial(self._keep_artifacts, client, run))
        self._reach(run, partial(self._terminate, client, result))
        if missing := len(self._waiting) + self._dropped:
            _say(run, f"warning: {missing} values are not in MLflow ({self._uri}): it could not be reached")
        self._client = None

    def _open(self, run: Run, directory: RunDir) -> None:
        """Find or make the run in MLflow."""
        from mlflow import MlflowClient  # here, because that takes seconds
        from mlflow.entities import RunTag

        client = MlflowClient(tracking_uri=self._uri)
        experiment, name = self.experiment or run.recipe.name, _name(directory)
        found = self._continued(client, run, directory)
        if found is None:
            found = client.create_run(_experiment(client, experiment, self._uri), run_name=name).info.run_id
            self._describe(client, found, run)
            directory.write_json(FILE, {"run_id": found})
        resumed = _cut(json.dumps(run.resumed), MAX_TAG)
        client.log_batch(found, tags=[RunTag("trainkit.resumed", resumed)] if run.resumed else [], synchronous=True)
        self._client, self._run_id = client, found
        _say(run, f"mlflow: {name}, experiment {experiment}, in {self._uri}")

    def _continued(self, client: MlflowClient, run: Run, directory: RunDir) -> str | None:
        """Return the id of the run in MLflow that the run directory names, or None where there is none to continue.

        Raises:
            RunError: the file names none.
        """
        from mlflow.exceptions import MlflowException

        path = directory.path / FILE
        if not path.exists():
            return None
        said = directory.read_json(FILE)
        run_id = as_mapping(said).get("run_id")
        if not isinstance(run_id, str) or not re.fullmatch(r"[0-9a-zA-Z]{1,64}", run_id):
            raise RunError(f"{path}: it names no run of MLflow; remove it to begin a new one there")
        try:
            found = client.get_run(run_id)
            is_there = found.info.lifecycle_stage == "active"
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            is_there = False
        if not is_there or found.data.tags.get("trainkit.recipe") != run.recipe.name:
            _say(run, f"warning: {self._uri} does not have the run {run_id} of this recipe; a new one is begun there")
            return None
        client.update_run(run_id, status="RUNNING")
        for name in found.data.metrics:
            for metric in client.get_metric_history(run_id, name):  # in the order in which they were written
                if metric.step >= run.step:
                    self._repeated[name, metric.step] = metric.value
        return run_id

    @staticmethod
    def _describe(client: MlflowClient, run_id: str, run: Run) -> None:
        """Write the recipe's values, and what identifies the run."""
        from mlflow.entities import Param, RunTag

        tags = {
            "trainkit.recipe": run.recipe.name,
            "trainkit.seed": run.recipe.seed,
            "trainkit.version": trainkit.__version__,
            "trainkit.revision": run.provenance["environment"]["revision"],
            "mlflow.note.content": run.recipe.description,  # the description, on MLflow's pages
        }
        params = [Param(key, _cut(value, MAX_PARAM)) for key, value in _params(run).items()]
        named = [RunTag(key, _cut(str(value), MAX_TAG)) for key, value in tags.items() if value not in (None, "")]
        client.log_batch(run_id, tags=named, synchronous=True)
        for start in range(0, len(params), MAX_PARAMS):
            client.log_batch(run_id, params=params[start : start + MAX_PARAMS], synchronous=True)

    def _write(self, run: Run) -> None:
        """Write the values that wait, as far as the store takes them."""
        assert self._client is not None
        client = self._client
        while self._waiting:
            part = self._waiting[:MAX_BATCH]
            if not self._reach(run, partial(_log_metrics, client, self._run_id, part)):
                return
            del self._waiting[: len(part)]

    def _reach(self, run: Run, action: Callable[[], None]) -> bool:
        """Do something with the store, and return whether it succeeded; the first failure in a row is said."""
        try:
            with _settings():
                action()
        except Exception as error:  # a store's library may raise anything, and a training does not depend on it
            if self._retry_at is None:
                _say(run, f"warning: {self._uri}: MLflow's store cannot be used, training goes on: {_line(error)}")
            self._retry_at = monotonic() + RETRY_AFTER
            return False
        self._retry_at = None
        return True

    def _keep_artifacts(self, client: MlflowClient, run: Run) -> None:
        """Copy the recipe, the result and the figures.

        Raises:
            RunError: they would not lie beside the SQLite file: it was moved, or a stranger's file names another place.
        """
        assert run.dir is not None
        home = run.dir.path
        if (database := _database(self._uri)) is not None:
            location = client.get_run(self._run_id).info.artifact_uri
            path = Path(unquote(urlsplit(location).path) if location.startswith("file:") else location)
            if not path.resolve().is_relative_to(database.resolve().parent):
                raise RunError(f"artifacts would go to {location}, and not beside {database}; name a new experiment")
        files = [*run.dir.versions("recipe.yaml"), home / "result.json", *sorted(home.glob("figures/*"))]
        for file in files:
            if file.is_file() and not file.is_symlink():
                inner = file.parent.relative_to(home).as_posix()
                client.log_artifact(self._run_id, str(file), None if inner == "." else inner)

    def _terminate(self, client: MlflowClient, result: Result) -> None:
        """Write how the run ended."""
        is_done = result.status == "completed" or result.finished
        client.set_tag(self._run_id, "trainkit.status", result.status)
        client.set_tag(self._run_id, "trainkit.reason", _cut(result.reason or "", MAX_TAG))
        status = "FAILED" if result.status == "failed" else "FINISHED" if is_done else "KILLED"
        client.set_terminated(self._run_id, status)


def _home(directory: RunDir) -> Path:
    """Return the folder whose runs share a store: the nearest that is named ``runs``, else the one above the run."""
    path = directory.path.resolve()
    return next((parent for parent in path.parents if parent.name == "runs"), path.parent)


def _name(directory: RunDir) -> str:
    """Return ``<recipe>/<time>-<seed>``: where the run lies below what runs share."""
    return directory.path.resolve().relative_to(_home(directory)).as_posix()


def _database(uri: str) -> Path | None:
    """Return the file of an SQLite store, or None for a server."""
    return Path(uri.removeprefix("sqlite:///")) if uri.startswith("sqlite:///") else None


def _refuse_other_file(path: Path, where: str) -> None:
    """Refuse to make MLflow's tables in a file that is something else.

    Raises:
        RecipeError: the file exists and has no tables of MLflow.
    """
    if "?" in str(path):
        raise RecipeError(f"{where}: {path}: SQLite's address cannot hold a `?`; name another file")
    if not path.exists():
        return
    try:
        if not path.is_file():
            raise sqlite3.DatabaseError("it is no regular file")
        with closing(sqlite3.connect(f"file:{quote(str(path.resolve()))}?mode=ro", uri=True)) as database:
            tables = {name for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
    except sqlite3.OperationalError:  # locked by another run: MLflow waits for it
        return
    except sqlite3.DatabaseError as error:
        raise RecipeError(f"{where}: {path}: not a store of MLflow: {error}; name another file") from error
    if tables and "experiments" not in tables:
        raise RecipeError(f"{where}: {path}: not a store of MLflow: a database of something else; name another file")


def _refuse_credentials(uri: str, where: str) -> None:
    """Refuse to send the user's credentials to a server that only a recipe names.

    Raises:
        RecipeError: MLflow would find credentials, and the user has not named this server.
    """
    file = Path("~/.mlflow/credentials").expanduser()
    found = [name for name in CREDENTIALS if os.environ.get(name)] + ([str(file)] if file.exists() else [])
    if found and os.environ.get("MLFLOW_TRACKING_URI", "").rstrip("/") != uri.rstrip("/"):
        raise RecipeError(
            f"{where}: MLflow would send {uri} the credentials in {', '.join(found)}, and that server is named by the "
            f"recipe alone; set MLFLOW_TRACKING_URI={uri} to allow it"
        )


@contextmanager
def _settings() -> Iterator[None]:
    """Have MLflow find its settings in the environment; what the user set of the defaults stays."""
    chosen = {**FIXED, **{name: value for name, value in DEFAULTS.items() if name not in os.environ}}
    before = {name: os.environ.get(name) for name in chosen}
    os.environ.update(chosen)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _experiment(client: MlflowClient, name: str, uri: str) -> str:
    """Return the id of an experiment, which is made where there is none.

    Raises:
        RunError: it was deleted; MLflow keeps its name until it is purged.
    """
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is None:
        database = _database(uri)
        location = None if database is None else (database.resolve().parent / ARTIFACTS).as_uri()
        try:
            made: str = client.create_experiment(name, artifact_location=location)
            return made
        except MlflowException as error:
            found = client.get_experiment_by_name(name)  # another run may have made it meanwhile
            if found is None:
                raise RunError(f"{uri}: the experiment {name!r} cannot be made: {_line(error)}") from error
    if found.lifecycle_stage != "active":
        raise RunError(
            f"{uri}: the experiment {name!r} was deleted; name another one with plugins.mlflow.experiment, or restore "
            f"it: mlflow experiments restore --experiment-id {found.experiment_id}"
        )
    return str(found.experiment_id)


def _log_metrics(client: MlflowClient, run_id: str, values: list[tuple[str, float, int, int]]) -> None:
    from mlflow.entities import Metric

    client.log_batch(run_id, metrics=[Metric(*value) for value in values], synchronous=True)


def _params(run: Run) -> dict[str, str]:
    """Return the resolved recipe's values, with every default, as ``plugins.sgd.lr``; lists and mappings as JSON."""
    values: dict[str, Any] = {}
    for key, value in run.provenance["recipe"].items():
        if isinstance(value, Mapping):
            values.update({f"{key}.{name}": inner for name, inner in value.items()})
        elif key not in ("name", "description"):  # which are tags
            values[key] = value
    plugins = run.provenance["plugins"]
    values["plugins"] = [listed["name"] for listed in plugins]
    for listed in plugins:
        values.update({f"plugins.{listed['name']}.{option}": value for option, value in listed["options"].items()})
    return {_key(key): value if isinstance(value, str) else json.dumps(value) for key, value in values.items()}


def _key(name: str) -> str:
    """Return a name that MLflow takes: others than these characters are an error there."""
    return re.sub(r"[^\w\-. :/]", "_", name)


def _cut(text: str, limit: int) -> str:
    return text if len(text) <= limit else f"{text[: limit - 1]}…"


def _is_same(known: float | None, value: float) -> bool:
    """Tell whether a value is what MLflow has of it."""
    if known is None:
        return False
    return (math.isnan(known) and math.isnan(value)) or known == max(-LARGEST, min(value, LARGEST))


def _line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:400]


def _say(run: Run, text: str) -> None:
    run.console.print(printable(text), markup=False, highlight=False, soft_wrap=True)
