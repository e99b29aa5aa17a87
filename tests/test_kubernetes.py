"""The Kubernetes manifests: held against the command lines, the server's routes and metrics, and each other."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
import yaml

from checkpoints.__main__ import main as checkpoints_main
from glm_jax.aot import saved
from glm_jax.aot.__main__ import main as aot_main
from glm_jax.processes import Member
from serving.__main__ import main as serving_main
from serving.app import create_app
from tests.serving.scripted import ScriptedEngine, scripted_service
from tests.test_container import environment_of, only

ROOT = Path(__file__).parents[1]
PAGES = ("kubernetes", "kubernetes-converted", "kubernetes-hosts", "kubernetes-scale")
TEXTS = {page: (ROOT / "docs" / f"{page}.yaml").read_text() for page in PAGES}
OBJECTS: dict[str, list[dict[str, Any]]] = {
    page: list(yaml.safe_load_all(text)) for page, text in TEXTS.items()
}
PROGRAMS = {"checkpoints": checkpoints_main, "glm_jax.aot": aot_main, "serving": serving_main}


def all_of(kind: str) -> list[dict[str, Any]]:
    return [each for page in PAGES for each in OBJECTS[page] if each["kind"] == kind]


def pods() -> list[Any]:
    """Every template of pods, by its page and kind."""
    return [
        pytest.param(each["spec"]["template"], id=f"{page} {each['kind']}")
        for page in PAGES
        for each in OBJECTS[page]
        if "template" in each["spec"]
    ]


def servers() -> list[Any]:
    return [pod for pod in pods() if "Job" not in str(pod.id)]


def containers(template: dict[str, Any]) -> list[dict[str, Any]]:
    return [*template["spec"].get("initContainers", ()), *template["spec"]["containers"]]


def server_of(template: dict[str, Any]) -> dict[str, Any]:
    (container,) = template["spec"]["containers"]
    return container


def parsed(container: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the command of a container is understood as; raises where it is not."""
    python, dash_m, name, command = container["command"]
    assert (python, dash_m) == ("python", "-m")
    for variable in container.get("env", ()):
        monkeypatch.setenv(variable["name"], variable.get("value", "0"))
    program = PROGRAMS[name].commands[command]
    # Files of the pod's are not here.
    words = [re.sub(r"^--api-key-file=.*", "--api-key=x", word) for word in container["args"]]
    return program.make_context(command, words).params


@pytest.mark.parametrize("template", pods())
def test_every_container_runs_a_command_that_its_program_understands(
    template: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    own = [each for each in containers(template) if each["command"][1] == "-m"]
    assert own
    for container in own:
        assert parsed(container, monkeypatch)


@pytest.mark.parametrize("template", servers())
def test_the_server_s_command_is_the_image_s(template: dict[str, Any]) -> None:
    assert server_of(template)["command"] == json.loads(only("", "CMD"))


@pytest.mark.parametrize("template", servers())
async def test_probes_and_annotations_name_routes_of_the_server(
    template: dict[str, Any], tmp_path: Path
) -> None:
    engine = ScriptedEngine(lambda request: [])
    async with scripted_service(engine, tmp_path) as service:
        routes = {rule.rule for rule in create_app(service).url_map.iter_rules()}
    named = set(re.findall(r"(?:path': '|:5000)(/\w+)'?", str(server_of(template))))
    assert "/readyz" in named <= routes
    annotations = template["metadata"].get("annotations", {})
    assert annotations.get("prometheus.io/path", "/metrics") in routes
    assert annotations.get("prometheus.io/port", "5000") == only("", "EXPOSE")


async def test_metrics_that_are_named_exist(tmp_path: Path) -> None:
    async with scripted_service(ScriptedEngine(lambda request: []), tmp_path) as service:
        metrics = service.metrics.exposition().decode()
        assert "/load" in {rule.rule for rule in create_app(service).url_map.iter_rules()}
    for page, text in TEXTS.items():
        told = set(re.findall(r"\bglm_(?!jax)\w+", text))
        assert all(f"\n{name}" in metrics for name in told), (page, told)
    assert re.search(r"glm_\w+", TEXTS["kubernetes-scale"])


@pytest.mark.parametrize("template", servers())
def test_ports_are_the_server_s(template: dict[str, Any]) -> None:
    ports = {port["name"]: port["containerPort"] for port in server_of(template)["ports"]}
    assert str(ports["http"]) == only("", "EXPOSE") == environment_of("")["PORT"]
    probes = [value for key, value in server_of(template).items() if key.endswith("Probe")]
    assert {probe["httpGet"]["port"] for probe in probes if "httpGet" in probe} <= ports.keys()


@pytest.mark.parametrize("template", servers())
def test_the_pod_drains_before_it_is_killed(template: dict[str, Any]) -> None:
    (waiting,) = re.findall(
        r"time\.sleep\((\d+)\)", server_of(template)["lifecycle"]["preStop"]["exec"]["command"][2]
    )
    assert template["spec"]["terminationGracePeriodSeconds"] > int(waiting) + 60


@pytest.mark.parametrize("template", pods())
def test_the_pod_is_the_image_s_user_and_may_little(template: dict[str, Any]) -> None:
    user = template["spec"]["securityContext"]
    assert user["runAsNonRoot"] and f"{user['runAsUser']}:{user['runAsGroup']}" == only("", "USER")
    for container in containers(template):
        assert container["securityContext"]["readOnlyRootFilesystem"]
        assert not container["securityContext"]["allowPrivilegeEscalation"]


@pytest.mark.parametrize("template", pods())
def test_volumes_are_mounted_and_claims_exist(template: dict[str, Any]) -> None:
    volumes = {each["name"]: each for each in template["spec"]["volumes"]}
    mounted = {m["name"] for each in containers(template) for m in each["volumeMounts"]}
    assert set(volumes) == mounted
    claims = {each["metadata"]["name"] for each in all_of("PersistentVolumeClaim")}
    wanted = [v["persistentVolumeClaim"] for v in volumes.values() if "persistentVolumeClaim" in v]
    assert wanted and all(claim["claimName"] in claims for claim in wanted)


def labels_of_pods() -> Iterator[dict[str, str]]:
    for pod in pods():
        yield pod.values[0]["metadata"]["labels"] | {"apps.kubernetes.io/pod-index": "0"}


def test_every_selector_finds_pods() -> None:
    selectors = [each["spec"]["selector"] for each in all_of("Service")]
    kinds = ("Deployment", "StatefulSet", "PodDisruptionBudget")
    selectors += [each["spec"]["selector"]["matchLabels"] for k in kinds for each in all_of(k)]
    selectors += [each["spec"]["podSelector"]["matchLabels"] for each in all_of("NetworkPolicy")]
    for selector in selectors:
        assert any(selector.items() <= labels.items() for labels in labels_of_pods()), selector
    (scaled,) = all_of("ScaledObject")
    names = {each["metadata"]["name"] for each in all_of("Deployment")}
    assert scaled["spec"]["scaleTargetRef"]["name"] in names


def test_ports_of_services_are_ports_of_pods() -> None:
    ports = {p["name"] for pod in servers() for p in server_of(pod.values[0])["ports"]}
    for service in all_of("Service"):
        for port in service["spec"]["ports"]:
            assert port.get("targetPort", port["name"]) in ports


def test_steps_are_compiled_for_the_limits_that_are_served(monkeypatch: pytest.MonkeyPatch) -> None:
    _, job, deployment = OBJECTS["kubernetes-converted"]
    job, deployment = job["spec"]["template"], deployment["spec"]["template"]
    convert, verify = (parsed(each, monkeypatch) for each in job["spec"]["initContainers"])
    build, serve = parsed(server_of(job), monkeypatch), parsed(server_of(deployment), monkeypatch)
    for name in ("max_concurrency", "max_seq_len", "max_batch_tokens", "kv_cache_dtype"):
        assert build[name] == serve[name]
    assert build["num_drafts"] == serve["speculative_tokens"]
    assert convert["target"] == build["target"] == f"b200x{serve['num_gpus']}"
    assert str(convert["destination"]) == build["model"] == str(serve["model_dir"])
    assert verify["directory"] == serve["model_dir"] and build["out"] == serve["engine"]
    # What the pod waits for is what an engine has when it is whole.
    (waiting,) = deployment["spec"]["initContainers"]
    assert f"{build['out']}/{saved._MANIFEST}" in waiting["args"][0]


@pytest.mark.parametrize("process_id", [0, 1])
def test_the_hosts_form_one_mesh(process_id: int, monkeypatch: pytest.MonkeyPatch) -> None:
    headless, stateful, http, policy = OBJECTS["kubernetes-hosts"]
    container = server_of(stateful["spec"]["template"])
    (variable,) = container["env"]
    options = {each.name: each for each in serving_main.commands["serve"].params}
    assert isinstance(options["process_id"], click.Option)
    assert variable["name"] == options["process_id"].envvar
    flags = parsed(container | {"env": [variable | {"value": str(process_id)}]}, monkeypatch)
    member = Member(flags["coordinator"], flags["num_processes"], flags["process_id"])
    assert member.process_id == process_id
    assert flags["num_processes"] == stateful["spec"]["replicas"]
    each = container["resources"]["limits"]["nvidia.com/gpu"]
    assert flags["num_gpus"] == each * flags["num_processes"]
    # The name that a headless service gives the first pod, and the two ports that processes use.
    host, port = member.steps_address
    name = stateful["metadata"]["name"]
    assert stateful["spec"]["serviceName"] == headless["metadata"]["name"]
    assert host == f"{name}-0.{headless['metadata']['name']}"
    ports = {p["name"]: p["port"] for p in headless["spec"]["ports"]}
    assert ports == {"coordinator": port - 1, "steps": port}
    assert headless["spec"]["clusterIP"] == "None" and headless["spec"]["publishNotReadyAddresses"]
    assert stateful["spec"]["podManagementPolicy"] == "Parallel"
    # Clients reach the one that serves; the ports between processes are for processes.
    assert http["spec"]["selector"]["apps.kubernetes.io/pod-index"] == "0"
    to_all, among_themselves = policy["spec"]["ingress"]
    assert to_all == {"ports": [{"port": "http"}]} and list(among_themselves) == ["from"]


@pytest.mark.parametrize(("process_id", "is_asked"), [("0", True), ("1", False)])
def test_only_the_process_that_serves_is_asked_whether_it_is_ready(
    process_id: str, is_asked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    monkeypatch.setattr("urllib.request.urlopen", lambda url, timeout: asked.append(url))
    monkeypatch.setenv("PROCESS_ID", process_id)
    container = server_of(OBJECTS["kubernetes-hosts"][1]["spec"]["template"])
    for kind in ("startup", "readiness"):
        exec(container[f"{kind}Probe"]["exec"]["command"][2], {})
    assert asked == ["http://127.0.0.1:5000/readyz"] * (2 if is_asked else 0)
