"""What lies in the folders under cluster/ can be used: commands, profile, image, metrics and paths are the real ones."""

from __future__ import annotations

import ast
import json
import re
import shlex
import tomllib
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from typer.testing import CliRunner

import lad_dist
from lad_dist import catalog, recipe_file
from lad_dist.cli import app
from lad_dist.profile import Profile

ROOT = Path(__file__).parents[1]
CLUSTER = ROOT / "cluster"
KUBERAY, CONTAINER, MONITORING = CLUSTER / "kuberay", CLUSTER / "container", CLUSTER / "monitoring"
INSTRUCTIONS = {
    "ARG",
    "CMD",
    "COPY",
    "ENTRYPOINT",
    "ENV",
    "EXPOSE",
    "FROM",
    "LABEL",
    "RUN",
    "USER",
    "VOLUME",
    "WORKDIR",
}


def check_command(words: list[str]) -> dict[str, str]:
    """The words after ``lad-dist`` are a verb with its options and one job; the options' values by name."""
    verb, *rest = words
    commands = typer.main.get_command(app).commands
    assert verb in commands, verb
    known = {option: p for p in commands[verb].params if p.param_type_name == "option" for option in p.opts}
    given, jobs = {}, []
    while rest:
        word = rest.pop(0)
        if word.startswith("-"):
            name, equals, value = word.partition("=")
            assert name in known, name
            given[name] = "" if known[name].is_flag else value if equals else rest.pop(0)
        else:
            jobs.append(word)
    (job,) = jobs
    assert job in catalog.jobs()
    return given


# Every folder


def folders() -> list[Path]:
    found = sorted({path.parent for path in CLUSTER.glob("*/*") if path.is_file() and "__pycache__" not in path.parts})
    assert {KUBERAY, CONTAINER, MONITORING} <= set(found)
    return found


@pytest.mark.parametrize("folder", folders(), ids=lambda folder: folder.name)
def test_the_readme_says_how_to_start_check_and_stop(folder):
    text = (folder / "README.md").read_text()
    for what in ("start", "check", "stop"):
        # a heading, or the first cell of a table's row as in cluster/README.md
        assert re.search(rf"^(#+ +{what}\b|\| *{what}\b)", text, re.MULTILINE | re.IGNORECASE), f"{folder.name}: {what}"


@pytest.mark.parametrize("file", sorted(CLUSTER.glob("*/README.md")), ids=lambda file: file.parent.name)
def test_paths_in_the_readme_exist(file):
    for name in re.findall(r"(?<![\w/.])((?:cluster|tests|lad_dist|jobs|docs)/[\w./-]+\w/?)", file.read_text()):
        assert (ROOT / name).exists(), name


def test_the_lines_that_start_a_ray_cluster_ask_for_a_token_first():
    """Without it the head starts open to the network, or refuses nodes and drivers (tried with Ray 2.60)."""
    lines = [line.strip() for line in readme(CLUSTER).splitlines() if line.startswith("    ")]
    (begin,) = [i for i, line in enumerate(lines) if line.startswith("ray start --head")]
    assert lines[begin - 2].startswith("export RAY_AUTH_MODE=token")
    assert "ray get-auth-token --generate" in lines[begin - 1]
    assert lines[begin + 1].startswith("ray start --address=HEAD:6379")
    command = lines[begin + 2].partition("#")[0]
    assert command.startswith("RAY_ADDRESS=HEAD:6379 lad-dist ")
    check_command(shlex.split(command)[2:])


def test_only_files_at_the_top_are_profiles():
    assert {path.parent for path in catalog.profiles().values()} == {CLUSTER}
    listed = CliRunner().invoke(app, ["clusters"])
    assert listed.exit_code == 0 and "local" in listed.output
    assert not re.search("rayjob|prometheus|kuberay", listed.output)


# KubeRay


def documents() -> dict[str, dict[str, Any]]:
    found = {doc["kind"]: doc for doc in yaml.safe_load_all((KUBERAY / "rayjob.yaml").read_text())}
    assert set(found) == {"ConfigMap", "RayJob"}
    return found


@pytest.fixture(scope="module")
def job() -> dict[str, Any]:
    return documents()["RayJob"]


def templates(job: dict[str, Any]) -> list[dict[str, Any]]:
    cluster = job["spec"]["rayClusterSpec"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    assert len(groups) >= 2 and all(isinstance(group["rayStartParams"], dict) for group in groups)
    return [group["template"]["spec"] for group in groups]


def test_the_rayjob_has_what_kuberay_asks_for(job):
    assert job["apiVersion"] == "ray.io/v1"
    assert re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", job["metadata"]["name"]) and len(job["metadata"]["name"]) < 48
    assert job["spec"]["submissionMode"] in ("K8sJobMode", "HTTPMode", "InteractiveMode")
    assert job["spec"]["shutdownAfterJobFinishes"] is True  # also what suspending asks for
    cluster = job["spec"]["rayClusterSpec"]
    assert f"ray=={cluster['rayVersion']}" in (ROOT / "constraints.txt").read_text().split()
    assert cluster["authOptions"] == {"mode": "token"}
    for group in cluster["workerGroupSpecs"]:
        assert group["groupName"] and 1 <= group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):  # they become options of a command line
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())


def test_pods_have_resources_the_image_and_no_root(job):
    image = built_image()
    for spec in templates(job):
        (container,) = spec["containers"]
        assert container["image"] == image
        requests, limits = container["resources"]["requests"], container["resources"]["limits"]
        assert {"cpu", "memory"} <= set(requests) == set(limits)
        assert requests.get("nvidia.com/gpu") == limits.get("nvidia.com/gpu")  # Kubernetes refuses others
        user = spec["securityContext"]
        assert user["runAsNonRoot"] is True
        assert f"{user['runAsUser']}:{user['runAsGroup']}" == dict(instructions())["USER"]
        volumes = {volume["name"] for volume in spec.get("volumes", [])}
        assert {mount["name"] for mount in container.get("volumeMounts", [])} == volumes
    head, *workers = templates(job)
    assert "nvidia.com/gpu" not in head["containers"][0]["resources"]["limits"]
    assert all(spec["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] >= 1 for spec in workers)


def test_pods_that_ask_for_gpus_may_run_on_gpu_nodes(job):
    """GPU nodes carry the taint ``nvidia.com/gpu:NoSchedule`` on GKE, and where the cluster's owner has put it."""
    asking = [spec for spec in templates(job) if "nvidia.com/gpu" in spec["containers"][0]["resources"]["limits"]]
    assert asking
    for spec in templates(job):
        tolerated = [t for t in spec.get("tolerations", []) if t["key"] == "nvidia.com/gpu"]
        assert [(t["operator"], t["effect"]) for t in tolerated] == (
            [("Exists", "NoSchedule")] if spec in asking else []
        )


def test_the_entrypoint_is_a_command_that_finds_its_files(job):
    program, *words = shlex.split(job["spec"]["entrypoint"])
    assert program == "lad-dist" and words[0] == "experts"
    options = check_command(words)
    head = templates(job)[0]
    mounts = {mount["mountPath"]: mount["name"] for mount in head["containers"][0]["volumeMounts"]}
    on, out = Path(options["--on"]), Path(options["--out"])
    (source,) = (volume for volume in head["volumes"] if volume["name"] == mounts[str(on.parent)])
    config = documents()["ConfigMap"]
    assert source["configMap"]["name"] == config["metadata"]["name"]
    assert on.name in config["data"]
    assert mounts[str(out.parent)]  # a run folder in the pod would be gone with it
    assert options["--buffers"].startswith("s3://")  # which workers see too
    assert dict(environment())["LAD_DIST_DATA"] in mounts


def test_the_profile_is_one(job):
    ((name, text),) = documents()["ConfigMap"]["data"].items()
    profile = recipe_file.validated(Profile, recipe_file.parse_yaml(text, name), name)
    assert profile.name == Path(name).stem
    assert profile.ray.address == "auto" and profile.fleet == "on" and profile.launcher == "local"
    assert profile.device == "auto"  # the head has no GPU: cuda would be refused there, and cpu leave the workers' idle


def test_no_secret_is_written_down(job):
    for spec in templates(job):
        (container,) = spec["containers"]
        assert "env" not in container
        (source,) = container["envFrom"]
        assert re.search(rf"kubectl create secret generic {source['secretRef']['name']}\b", readme(KUBERAY))
    assert "kind: Secret" not in (KUBERAY / "rayjob.yaml").read_text()


def test_the_readme_names_what_the_rayjob_names(job):
    text = readme(KUBERAY)
    assert set(re.findall(r"(?:rayjob|job/) ?(lad-dist[\w-]*)", text)) == {job["metadata"]["name"]}
    claims = [v["persistentVolumeClaim"]["claimName"] for s in templates(job) for v in s.get("volumes", ())
              if "persistentVolumeClaim" in v]  # fmt: skip
    assert claims and all(f"metadata: {{name: {claim}}}" in text for claim in claims)
    options = shlex.split(job["spec"]["entrypoint"])
    assert f"lad-dist status {options[options.index('--out') + 1]}" in text
    assert options[options.index("--buffers") + 1] in text


# The container


def readme(folder: Path) -> str:
    return (folder / "README.md").read_text()


def instructions() -> list[tuple[str, str]]:
    """(instruction, rest) of each line; continued lines are one."""
    text = re.sub(r"^\s*#.*\n", "", (CONTAINER / "Containerfile").read_text(), flags=re.MULTILINE)
    lines = re.sub(r"\\\n\s*", " ", text).splitlines()
    return [(word, rest.strip()) for word, _, rest in (line.partition(" ") for line in lines if line.strip())]


def environment() -> list[tuple[str, str]]:
    return [tuple(pair.split("=", 1)) for word, rest in instructions() if word == "ENV" for pair in shlex.split(rest)]


def built_image() -> str:
    (image,) = set(re.findall(r"docker build [^`]*-t (\S+) \.`", readme(CONTAINER)))
    return str(image)


def pinned(image: str) -> bool:
    """Whether an image has a tag with a full version in it, or a digest."""
    return re.search(r"@sha256:[0-9a-f]{64}$|:[^:/]*\d+\.\d+\.\d+[^:/]*$", image) is not None


def test_instructions_are_known_and_in_order():
    words = [word for word, _ in instructions()]
    assert set(words) <= INSTRUCTIONS, set(words) - INSTRUCTIONS
    assert words[:2] == ["ARG", "FROM"] and words.count("FROM") == 1
    for word, rest in instructions():
        if word in ("ENTRYPOINT", "CMD"):
            assert isinstance(json.loads(rest), list)  # a shell in between would keep signals to itself
    assert json.loads(dict(instructions())["ENTRYPOINT"]) == ["lad-dist"]


def test_copied_files_exist_and_are_what_the_installation_needs():
    copied = {source for word, rest in instructions() if word == "COPY" for source in rest.split()[:-1]}
    assert copied and all((ROOT / source).exists() for source in copied), copied
    ignored = (CONTAINER / "Containerfile.dockerignore").read_text().split("\n")
    assert "*" in ignored and {line[1:] for line in ignored if line.startswith("!")} == copied
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    wheel = project["tool"]["hatch"]["build"]["targets"]["wheel"]["only-include"]
    assert {"pyproject.toml", project["project"]["readme"], *wheel} <= copied


def test_bases_are_pinned():
    (base,) = [rest.partition("=")[2] for word, rest in instructions() if word == "ARG" and rest.startswith("BASE=")]
    assert base.startswith("python:3.11.")
    others = re.findall(r"--build-arg BASE=([^`\s]+)", readme(CONTAINER))
    assert others and all(pinned(image) for image in (base, *others))
    assert dict(instructions())["FROM"] == "${BASE}"
    everything = [path for folder in (KUBERAY, CONTAINER) for path in folder.iterdir()]
    assert not any(":latest" in path.read_text() for path in everything if path.is_file())


def test_what_counts_as_pinned():
    assert pinned("python:3.11.13-slim") and pinned("python@sha256:" + "0" * 64)
    assert not any(pinned(image) for image in ("python", "python:latest", "python:3.11-slim", "host:5000/python"))


def test_versions_are_those_of_the_constraints():
    installations = [rest for word, rest in instructions() if word == "RUN" and "pip install" in rest]
    assert any(re.search(r" /src( |$)", rest) for rest in installations)
    for rest in installations:
        assert rest.count("pip install") == rest.count("-c /src/constraints.txt") == 1, rest
        assert "--no-cache-dir" in rest


def test_triton_can_compile():
    """Triton builds a C extension for each kernel's launcher when it first runs."""
    (system,) = [rest for word, rest in instructions() if word == "RUN" and "apt-get" in rest]
    always, _, without_python = system.partition("command -v python3")
    assert {"gcc", "libc6-dev"} <= set(always.split())
    assert "python3-dev" in without_python.split()  # the default base's own Python has its headers


def test_the_user_is_not_root():
    last = [rest for word, rest in instructions() if word == "USER"][-1]
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", last)  # runAsNonRoot can judge numbers only
    assert re.search(
        rf"useradd\b.* --uid {last.partition(':')[0]}\b", " ".join(r for w, r in instructions() if w == "RUN")
    )


def test_the_readme_runs_what_it_builds():
    image, text = built_image(), readme(CONTAINER)
    assert image.endswith(f":{lad_dist.__version__}") and pinned(image)
    joined = re.sub(r"\\\n\s*", " ", text)
    commands = re.findall(r"docker run [^`\n]+", joined)
    verbs = [command.partition(f"{image} ")[2] for command in commands]
    assert len(verbs) >= 3 and all(verbs)  # each names the image, and something after it
    (run,) = [verb for verb in verbs if verb.startswith("run ")]
    check_command(shlex.split(run))
    data = dict(environment())["LAD_DIST_DATA"]
    assert f":{data}" in text and f":{dict(instructions())['WORKDIR']}/runs" in text


# Monitoring


def defined_metrics() -> dict[str, str]:
    """name -> gauge or counter, of every metric that fleet.py makes."""
    tree = ast.parse((ROOT / "lad_dist" / "experts" / "fleet.py").read_text())
    (owner,) = (node for node in ast.walk(tree) if isinstance(node, ast.ClassDef) and node.name == "_Metrics")
    calls = [n for n in ast.walk(owner) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)]
    found = {c.args[0].value: c.func.id for c in calls if c.func.id in ("gauge", "counter")}
    assert len(found) >= 7 and all(name.startswith("ladist_") for name in found)
    return found


def exported(name: str, kind: str) -> str:
    """What Prometheus sees of a metric: Ray puts its own prefix, and OpenMetrics wants counters to end in _total."""
    return f"ray_{name}" + ("_total" if kind == "counter" and not name.endswith("_total") else "")


def dashboard() -> dict[str, Any]:
    return json.loads((MONITORING / "grafana-dashboard.json").read_text())


def test_the_dashboard_shows_every_metric_and_no_other():
    wanted = {exported(name, kind): kind for name, kind in defined_metrics().items()}
    expressions = [target["expr"] for panel in dashboard()["panels"] for target in panel["targets"]]
    shown = {name for text in expressions for name in re.findall(r"\b(?:ray_)?ladist_\w+", text)}
    assert shown == set(wanted)
    whole = (MONITORING / "grafana-dashboard.json").read_text()
    assert set(re.findall(r"\b(?:ray_)?ladist_\w+", whole)) == set(wanted)  # in the variables too
    for text in expressions:
        for name in re.findall(r"ray_ladist_\w+", text):
            assert bool(re.search(rf"\brate\({name}\b", text)) == (wanted[name] == "counter"), text
        assert text.count("(") == text.count(")") and text.count("{") == text.count("}")
    assert any(re.search(r"by \(expert\) \(ray_ladist_images_per_second", text) for text in expressions)


def test_panels_are_whole_and_do_not_overlap():
    panels = dashboard()["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        assert panel["title"] and panel["description"] and panel["datasource"]["uid"] == "${datasource}"
        at = panel["gridPos"]
        assert at["x"] + at["w"] <= 24
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not cells & taken, panel["title"]
        taken |= cells
    variables = {variable["name"] for variable in dashboard()["templating"]["list"]}
    used = set(re.findall(r"\$\{?(\w+)", (MONITORING / "grafana-dashboard.json").read_text()))
    assert used - {"__rate_interval"} == variables


def test_the_readme_of_the_metrics_names_them_all():
    names = {exported(name, kind) for name, kind in defined_metrics().items()}
    assert set(re.findall(r"ray_ladist_\w+", readme(MONITORING))) == names


def test_prometheus_reads_the_file_that_ray_writes():
    from ray._private import ray_constants

    config = yaml.safe_load((MONITORING / "prometheus.yml").read_text())
    assert set(config) <= {"global", "scrape_configs"}
    (scrape,) = config["scrape_configs"]
    (discovery,) = scrape["file_sd_configs"]
    assert scrape["job_name"] and discovery["files"]
    for file in discovery["files"]:
        # Prometheus takes wildcards in the last component only, and these endings
        assert re.fullmatch(r"/[^*]*(\*[^/]*)?\.(json|ya?ml)", file)
        assert Path(file).name == ray_constants.PROMETHEUS_SERVICE_DISCOVERY_FILE
        assert file.startswith("/tmp/ray/")  # Ray's temporary folder where nothing else is said


# --- the project's own files ------------------------------------------------------------------------------------------


def targets() -> set[str]:
    return set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


@pytest.mark.parametrize("path", sorted((ROOT / ".github" / "workflows").glob("*.yml")), ids=lambda path: path.stem)
def test_workflows_call_what_there_is(path):
    document = yaml.safe_load(path.read_text())
    lines = [step["run"] for job in document["jobs"].values() for step in job["steps"] if "run" in step]
    assert lines and (ROOT / ".github" / "workflows" / "test.yml").exists()
    for words in map(shlex.split, lines):
        if words[0] == "make":
            assert {word for word in words[1:] if "=" not in word} <= targets()
        else:
            assert (ROOT / words[0]).stat().st_mode & 0o100, words[0]


def test_the_hooks_are_the_checks_of_make():
    (local,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    makefile = (ROOT / "Makefile").read_text().replace("$(BIN)", ".venv/bin")
    assert local["repo"] == "local" and [hook["id"] for hook in local["hooks"]] == ["ruff-check", "ruff-format", "mypy"]
    assert all(hook["entry"] in makefile for hook in local["hooks"])


def test_the_citation_is_of_this_version():
    document = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert str(document["version"]) == lad_dist.__version__ and document["license"] == "Apache-2.0"
    assert any("2408.14506" in i["value"] for reference in document["references"] for i in reference["identifiers"])


def test_the_map_of_contributing_names_every_room():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    package = ROOT / "lad_dist"
    rooms = {f"{p.name}/" for p in package.iterdir() if (p / "__init__.py").exists()}
    rooms |= {p.name for p in package.glob("*.py") if p.name != "__init__.py"}
    named = set(re.findall(r"`([a-z_]+(?:/|\.py))`", text[text.index("## The rooms") :]))
    assert named - {"tests/test_arrows.py"} == rooms
