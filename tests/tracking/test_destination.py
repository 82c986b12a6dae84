"""Where a run is tracked: the recipe, the site's environment, else one database for all runs of a project."""

from pathlib import Path

import pytest

from megatron_sbn.config import Recipe, load_recipe
from megatron_sbn.errors import RecipeError
from megatron_sbn.tracking import destination as place
from megatron_sbn.tracking.destination import Destination, destination
from megatron_sbn.tracking.sqlite_file import database_file, database_uri

QUICK = Path(__file__).parents[2] / "recipes" / "quickstart.yaml"


@pytest.fixture(autouse=True)
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, without what a site sets."""
    for name in (place.URI_VARIABLE, place.EXPERIMENT_VARIABLE):
        monkeypatch.delenv(name, raising=False)
    folder = tmp_path / "project"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def recipe(*overrides: str) -> Recipe:
    return load_recipe(QUICK, ["tracking.experiment=null", *overrides])


@pytest.mark.parametrize("run", ["runs/a", "runs/study/a", "runs/deep/study/a"])
def test_one_database_whatever_the_depth_of_run_dir(run: str, project: Path) -> None:
    expected = Destination(database_uri(project / "runs" / "mlflow.db"), "megatron_sbn")
    assert destination(recipe(), Path(run)) == destination(recipe(), project / run) == expected


def test_elsewhere_it_is_beside_the_run_or_its_study(tmp_path: Path) -> None:
    run = tmp_path / "scratch" / "study" / "a"
    assert database_file(destination(recipe(), run).uri) == tmp_path / "scratch" / "study" / "mlflow.db"
    of_study = recipe("tracking.study=study")
    assert database_file(destination(of_study, run).uri) == tmp_path / "scratch" / "mlflow.db"


def test_the_sites_environment_is_the_default_and_the_recipe_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(place.URI_VARIABLE, "http://site:5000")
    monkeypatch.setenv(place.EXPERIMENT_VARIABLE, "everybody")
    assert destination(recipe(), Path("runs/a")) == Destination("http://site:5000", "everybody")
    own = recipe("tracking.uri=sqlite:///own.db", "tracking.experiment=mine")
    assert destination(own, Path("runs/a")) == Destination("sqlite:///own.db", "mine")


@pytest.mark.parametrize("uri", ["htp://nowhere", "mlruns", "./mlruns", "file:/mlruns", "/x/mlruns"])
def test_what_no_mlflow_can_be_is_refused(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RecipeError, match=r"tracking.uri = .* is no tracking URI of MLflow; give http"):
        destination(recipe(f"tracking.uri={uri}"), Path("runs/a"))
    monkeypatch.setenv(place.URI_VARIABLE, uri)
    with pytest.raises(RecipeError, match="environment variable MLFLOW_TRACKING_URI = "):
        destination(recipe(), Path("runs/a"))


def test_an_empty_experiment_is_refused() -> None:
    with pytest.raises(RecipeError, match="tracking.experiment = ''"):
        recipe("tracking.experiment=''")


@pytest.mark.parametrize("name", ["what?", "50%", "a#b", "a b", "a%3Fb", "\u00fc"])
def test_any_name_of_a_folder_is_kept(name: str, tmp_path: Path) -> None:
    """As SQLAlchemy reads the URI, too."""
    from sqlalchemy.engine import make_url

    path = tmp_path / name / "mlflow.db"
    uri = database_uri(path)
    assert database_file(uri) == path
    assert make_url(uri).database == str(path)


def test_what_is_printed_serves_with_one_worker_and_opens_the_run_list() -> None:
    here = Destination("sqlite:////p/mlflow.db", "e")
    assert here.open_command == "mlflow server --backend-store-uri sqlite:////p/mlflow.db --workers 1 --port 5000"
    assert here.link("7") == "http://localhost:5000/#/experiments/7?workflowType=machine_learning"
    server = Destination("https://user:hush@site/", "e")
    assert server.open_command == "https://***@site/"
    assert server.link("7") == "https://***@site/#/experiments/7?workflowType=machine_learning"
