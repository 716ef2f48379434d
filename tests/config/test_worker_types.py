"""What the answers of real and hostile workers are read as."""

from __future__ import annotations

from pathlib import Path

import orjson
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from balancer.core.model import Condition, Endpoint, ModelName, ModelOffer, Worker, WorkerId
from balancer.worker_types import (
    EMBEDDING,
    GENERATING,
    LEAST_LOAD_SECONDS,
    LOAD_SECONDS_OF_UNKNOWN_SIZE,
    MAX_MODELS,
    MAX_NAME_CHARACTERS,
    MAX_PROBE_BYTES,
    MAX_REQUESTS,
    WORKER_TYPES,
    ProbeFailed,
    named_models,
    row_of,
)

SAMPLES = Path(__file__).parent / "samples"


def sample(name: str) -> Condition:
    recorded = orjson.loads((SAMPLES / f"{name}.json").read_bytes())
    return WORKER_TYPES[recorded["type"]].read_probe(recorded["status"], recorded["body"].encode())


def sample_besides(probe: str, *pages: str) -> Condition:
    """The condition after all these answers."""
    condition = sample(probe)
    for name in pages:
        recorded = orjson.loads((SAMPLES / f"{name}.json").read_bytes())
        rows = WORKER_TYPES[recorded["type"]].more
        path = recorded.get("path", rows[0].path)
        page = next(page for page in rows if page.path == path)
        condition = page.read(condition, recorded["status"], recorded["body"].encode())
    return condition


def by_name(condition: Condition) -> dict[str, ModelOffer]:
    return {offer.name: offer for offer in condition.models}


def models(condition: Condition) -> dict[str, tuple[frozenset[Endpoint], int | None]]:
    return {offer.name: (offer.endpoints, offer.context_tokens) for offer in condition.models}


def probed(type_name: str, body: object, status: int = 200) -> Condition:
    raw = body if isinstance(body, bytes) else orjson.dumps(body)
    return WORKER_TYPES[type_name].read_probe(status, raw)


ALL = frozenset(Endpoint)


@pytest.mark.parametrize(
    ("name", "engine", "offered"),
    [
        ("llama_cpp_ready", "llama.cpp", {"smollm2": (ALL, 2048)}),
        ("vllm_ready", "vLLM", {"Qwen/Qwen2.5-7B-Instruct": (ALL, 32768)}),
        ("mlx_without_hub_cache", "", {}),
        (
            "lm_studio_v1",
            "LM Studio",
            {"qwen2.5-7b-instruct": (ALL, None), "text-embedding-nomic-embed-text-v1.5": (ALL, None)},
        ),
        (
            "lm_studio_detailed",
            "LM Studio",
            {
                "qwen2.5-7b-instruct": (GENERATING, 8192),
                "text-embedding-nomic-embed-text-v1.5": (EMBEDDING, 2048),
            },
        ),
        (
            "ollama_tags",
            "Ollama",
            {
                "llama3.2:latest": (ALL, None),
                "llama3.2": (ALL, None),
                "nomic-embed-text:latest": (EMBEDDING, None),
                "nomic-embed-text": (EMBEDDING, None),
            },
        ),
        ("ollama_empty", "Ollama", {}),
        ("llama_cpp_models", "llama.cpp", {"smollm2": (ALL, 2048)}),
    ],
)
def test_a_ready_worker_offers_its_models(name, engine, offered):
    condition = sample(name)
    assert condition.ready
    assert condition.engine == engine
    assert models(condition) == offered


@pytest.mark.parametrize(
    ("name", "identities"),
    [
        ("llama_cpp_ready", {"smollm2": ""}),  # the name that it was started with has no size
        ("vllm_ready", {"Qwen/Qwen2.5-7B-Instruct": ""}),  # which of the checkpoint's precisions is not said
        ("lm_studio_v1", {"qwen2.5-7b-instruct": "", "text-embedding-nomic-embed-text-v1.5": ""}),
        (
            "ollama_tags",
            {
                "llama3.2:latest": "ollama/llama3.2-3.2b q4_k_m",
                "llama3.2": "ollama/llama3.2-3.2b q4_k_m",
                "nomic-embed-text:latest": "ollama/nomic-embed-text-137m f16",
                "nomic-embed-text": "ollama/nomic-embed-text-137m f16",
            },
        ),
    ],
)
def test_a_worker_tells_what_its_models_are_as_far_as_it_knows(name, identities):
    assert {offer.name: offer.identity for offer in sample(name).models} == identities


def test_a_model_of_ollama_without_its_tag_is_asked_for_by_its_whole_name():
    offers = by_name(sample("ollama_tags"))
    assert offers["llama3.2"].known_as == "llama3.2:latest"
    assert offers["llama3.2:latest"].known_as is None


def test_a_model_that_is_served_under_any_name_is_known_by_what_was_loaded():
    row = {"id": "chat", "root": "/models/Qwen/Qwen2.5-7B-Instruct-AWQ", "parent": None}
    adapter = {"id": "a-7b-awq", "root": "/loras/b-7b-awq", "parent": "chat"}
    offers = by_name(probed("openai", {"data": [row, adapter]}))
    assert offers["chat"].identity == "qwen2.5-7b-instruct awq"
    assert offers["a-7b-awq"].identity == ""


def test_llama_cpp_tells_its_quantisation_where_the_name_does_not():
    row = {"id": "Qwen2.5-7B-Instruct", "meta": {"ftype": "Q4_K - Medium"}}
    assert probed("openai", {"data": [row]}).models[0].identity == "qwen2.5-7b-instruct q4_k_m"


def test_ollama_tells_which_models_are_in_memory():
    offers = by_name(sample_besides("ollama_tags", "ollama_ps"))
    assert {name: offer.loaded for name, offer in offers.items()} == {
        "llama3.2:latest": True,
        "llama3.2": True,
        "nomic-embed-text:latest": False,
        "nomic-embed-text": False,
    }


def test_loading_is_guessed_from_the_size_until_it_is_measured():
    rows = [{"name": "big", "size": 15_000_000_000}, {"name": "small", "size": 5}, {"name": "none"}]
    offers = by_name(probed("ollama", {"models": rows}))
    assert offers["big"].load_seconds == pytest.approx(10)
    assert offers["small"].load_seconds == LEAST_LOAD_SECONDS
    assert offers["none"].load_seconds == LOAD_SECONDS_OF_UNKNOWN_SIZE


def test_lm_studio_tells_more_of_what_it_serves_on_its_own_path():
    offers = by_name(sample_besides("lm_studio_v1", "lm_studio_detailed"))
    chat, embeds = offers["qwen2.5-7b-instruct"], offers["text-embedding-nomic-embed-text-v1.5"]
    assert (chat.identity, chat.loaded, chat.context_tokens) == ("qwen2.5-7b-instruct 4bit", True, 8192)
    assert (embeds.loaded, embeds.load_seconds) == (False, LOAD_SECONDS_OF_UNKNOWN_SIZE)
    assert (chat.endpoints, embeds.endpoints) == (GENERATING, EMBEDDING)


def test_what_lm_studio_has_on_disk_only_is_not_offered():
    served = Condition(models=(ModelOffer(name=ModelName("other")),))
    body = orjson.dumps({"data": [{"id": "on-disk", "state": "not-loaded"}]})
    assert WORKER_TYPES["lm_studio"].more[0].read(served, 200, body) == served


@pytest.mark.parametrize(
    ("type_name", "status", "body"),
    [
        ("ollama", 404, b"404 page not found"),
        ("ollama", 200, b"{}"),
        ("lm_studio", 404, b""),
        ("lm_studio", 200, b"["),
    ],
)
def test_an_older_worker_without_that_path_is_told_from_one_with_nothing_loaded(type_name, status, body):
    with pytest.raises(ProbeFailed):
        WORKER_TYPES[type_name].more[0].read(sample("ollama_tags"), status, body)
    with pytest.raises(ProbeFailed):
        sample_besides("lm_studio_v1", "lm_studio_without_v0")


# llama.cpp and vLLM, each asked as what it is ...


def test_llama_cpp_tells_its_slots_its_file_and_what_it_holds():
    condition = sample_besides("llama_cpp_models", "llama_cpp_props")
    assert (condition.slots, condition.running) == (2, None)
    assert condition.models[0].identity == "smollm2-135m-instruct q4_1"
    assert sample_besides("llama_cpp_models", "llama_cpp_props", "llama_cpp_slots").running == 2
    pages = ("llama_cpp_props", "llama_cpp_slots", "llama_cpp_metrics")
    assert sample_besides("llama_cpp_models", *pages).running == 3  # one waits for a slot


def test_slots_are_counted_where_nothing_else_tells_them():
    assert sample_besides("llama_cpp_models", "llama_cpp_slots").slots == 2


@pytest.mark.parametrize("page", ["llama_cpp_without_slots", "llama_cpp_without_metrics"])
def test_a_llama_cpp_that_was_started_without_a_page_does_not_have_it(page):
    with pytest.raises(ProbeFailed, match="501"):
        sample_besides("llama_cpp_models", page)


def test_a_wrong_key_is_certain_at_once():
    with pytest.raises(ProbeFailed, match="api_key") as failed:
        sample("llama_cpp_wrong_key")
    assert failed.value.certain


def test_a_llama_cpp_that_sleeps_has_to_load_its_model():
    body = orjson.dumps({"total_slots": 4, "is_sleeping": True})
    asleep = WORKER_TYPES["llama_cpp"].more[0].read(sample("llama_cpp_models"), 200, body)
    assert (asleep.slots, asleep.models[0].loaded) == (4, False)
    assert asleep.models[0].load_seconds > 0


def test_a_llama_cpp_with_several_models_tells_which_are_loaded():
    condition = sample("llama_cpp_several_models")
    assert [(offer.loaded, offer.loading) for offer in condition.models] == [
        (True, False),
        (False, False),
        (False, True),
    ]


def test_vllm_tells_its_kv_cache_and_what_it_holds():
    idle = sample_besides("vllm_ready", "vllm_metrics")
    assert (idle.running, idle.slots) == (0, None)
    assert [offer.memory_tokens for offer in idle.models] == [46592]
    assert "0% full" in idle.detail
    busy = sample_besides("vllm_ready", "vllm_metrics_busy")
    assert busy.running == 11
    assert [offer.memory_tokens for offer in busy.models] == [32_000]


def test_what_vllms_server_counts_is_taken_where_the_engine_tells_less():
    assert sample_besides("vllm_ready", "vllm_load").running == 6
    assert sample_besides("vllm_ready", "vllm_metrics_busy", "vllm_load").running == 11
    load = next(page for page in WORKER_TYPES["vllm"].more if page.path == "/load")
    # Not started to count them, it says 0 whatever it does.
    assert load.read(sample("vllm_ready"), 200, b'{"server_load":0}').running is None


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"vllm:num_requests_running 3.0\n",
        b"vllm:num_requests_running NaN\nvllm:num_requests_waiting 0.0\n",
        b"vllm:num_requests_running -1\nvllm:num_requests_waiting 0.0\n",
        b"vllm:num_requests_running 1e300\nvllm:num_requests_waiting 0.0\n",
        b"vllm:num_requests_running 1e\nvllm:num_requests_waiting 0.0\n",
        b"\xff\xfe",
    ],
)
def test_a_page_of_metrics_that_makes_no_sense_tells_nothing(body):
    with pytest.raises(ProbeFailed):
        WORKER_TYPES["vllm"].more[0].read(sample("vllm_ready"), 200, body)


# Remote APIs ...


def remote(type_name: str, **models: str) -> Worker:
    return Worker(
        id=WorkerId("r"),
        type=type_name,
        url="https://api.example.com:443",
        fallback=True,
        aliases=tuple((ModelName(name), ModelName(own)) for name, own in models.items()),
    )


def test_a_remote_api_offers_what_the_config_names_whatever_it_lists():
    worker = remote("anthropic", small="claude-sonnet-4-5-20250929", other="claude-old")
    condition = named_models(worker, sample("anthropic_models"))
    assert {offer.name: offer.context_tokens for offer in condition.models} == {
        "claude-sonnet-4-5-20250929": 200_000,
        "claude-old": None,
    }
    assert {offer.endpoints for offer in condition.models} == {frozenset({Endpoint.CHAT})}
    assert {offer.continues for offer in condition.models} == {False}
    assert condition.detail == 'it does not list claude-old, named in "models"'
    assert condition.engine == "Anthropic"


def test_azure_lists_models_and_is_asked_for_deployments():
    condition = named_models(remote("azure", chat="our-deployment"), sample("azure_models"))
    assert [offer.name for offer in condition.models] == ["our-deployment"]
    assert condition.detail == ""


@pytest.mark.parametrize("status", [500, 503, 529])
def test_a_remote_api_that_fails_is_not_well(status):
    with pytest.raises(ProbeFailed, match=str(status)) as failed:
        row_of(remote("openai", a="gpt-4o-mini")).read_probe(status, b"")
    assert not failed.value.certain


@pytest.mark.parametrize("status", [404, 405, 429, 200])
def test_a_remote_api_that_lists_nothing_is_used_as_it_is_configured(status):
    worker = remote("openai", a="gpt-4o-mini")
    condition = named_models(worker, row_of(worker).read_probe(status, b"<html>"))
    assert [offer.name for offer in condition.models] == ["gpt-4o-mini"]


@pytest.mark.parametrize("status", [401, 402, 403])
def test_a_refused_key_is_told_without_a_word_of_what_the_api_says(status):
    said = b'{"error": {"message": "Incorrect API key provided: sk-abc***xyz"}}'
    with pytest.raises(ProbeFailed) as failed:
        row_of(remote("openai", a="b")).read_probe(status, said)
    assert failed.value.certain
    assert "sk-" not in str(failed.value)
    assert str(status) in str(failed.value)
    with pytest.raises(ProbeFailed):
        sample("anthropic_wrong_key")


# Where things are ...


@pytest.mark.parametrize(
    ("worker", "path", "place"),
    [
        ({"type": "openai", "url": "http://h:1"}, "/v1/models", "/v1/models"),
        ({"type": "openai", "url": "http://h:1/v1"}, "/v1/models", "/v1/models"),
        ({"type": "openai", "url": "https://h:443/api/v1"}, Endpoint.CHAT, "/api/v1/chat/completions"),
        ({"type": "openai", "url": "https://h:443/v3"}, Endpoint.CHAT, "/v3/chat/completions"),
        ({"type": "vllm", "url": "http://h:1/gpu/v1"}, "/metrics", "/gpu/metrics"),
        ({"type": "ollama", "url": "http://[fd00::1]:1/v1"}, "/api/ps", "/api/ps"),
        ({"type": "anthropic", "url": "https://h:443"}, Endpoint.CHAT, "/v1/messages"),
        ({"type": "anthropic", "url": "https://h:443/claude/v1"}, Endpoint.CHAT, "/claude/v1/messages"),
        ({"type": "anthropic", "url": "https://h:443"}, "/v1/models?limit=1000", "/v1/models?limit=1000"),
        ({"type": "azure", "url": "https://h:443"}, Endpoint.CHAT, "/openai/v1/chat/completions"),
        ({"type": "azure", "url": "https://h:443/openai/v1"}, "/v1/models", "/openai/v1/models"),
        (
            {"type": "azure", "url": "https://h:443", "api_version": "2024-10-21"},
            Endpoint.CHAT,
            "/openai/deployments/mini/chat/completions?api-version=2024-10-21",
        ),
        (
            {"type": "azure", "url": "https://h:443/openai", "api_version": "2024-10-21"},
            Endpoint.EMBEDDINGS,
            "/openai/deployments/mini/embeddings?api-version=2024-10-21",
        ),
    ],
)
def test_a_path_of_openais_api_is_where_the_worker_has_it(worker, path, place):
    it = Worker(id=WorkerId("w"), **worker)
    assert row_of(it).place(it, str(path), ModelName("mini")) == place


def test_azures_dated_api_lists_its_models_apart_from_deployments():
    it = Worker(id=WorkerId("w"), type="azure", url="https://h:443", api_version="2024-10-21")
    assert row_of(it).place(it, "/v1/models", None) == "/openai/models?api-version=2024-10-21"


def test_every_sample_is_read_by_some_test():
    here = Path(__file__).read_text()
    assert all(f'"{path.stem}"' in here for path in SAMPLES.glob("*.json"))


def test_a_llama_cpp_that_loads_is_alive_and_not_ready():
    condition = sample("llama_cpp_loading")
    assert (condition.ready, condition.state) == (False, "loading")


def test_a_worker_that_lists_nothing_says_what_to_configure():
    assert '"model"' in sample("mlx_without_hub_cache").detail


@pytest.mark.parametrize(
    ("status", "body", "sentence"),
    [
        (401, b"", "api_key"),
        (404, b"not here", '"type" and "port"'),
        (500, b'{"error": {"message": "out of\\nmemory"}}', "500: out of memory"),
        (503, b'{"error": "overloaded"}', "503: overloaded"),
        (200, b"<html>", "not JSON"),
        (200, b"[]", 'no list "data"'),
        (200, b'{"data": {}}', 'no list "data"'),
        (200, b" " * (MAX_PROBE_BYTES + 1), "longer than"),
    ],
)
def test_an_answer_that_no_worker_gives_fails_the_probe_with_a_sentence(status, body, sentence):
    with pytest.raises(ProbeFailed, match=sentence):
        WORKER_TYPES["openai"].read_probe(status, body)


def test_names_that_cannot_be_shown_are_left_out_and_counted():
    names = ["good", "", "a\nb", "x" * (MAX_NAME_CHARACTERS + 1), 7, None]
    condition = probed("openai", {"data": [{"id": name} for name in names]})
    assert list(models(condition)) == ["good"]
    assert condition.detail.startswith("5 models left out")


def test_absurdly_many_models_are_cut_and_that_is_said():
    condition = probed("ollama", {"models": [{"name": f"m:{n}"} for n in range(MAX_MODELS + 5)]})
    assert len(condition.models) == MAX_MODELS
    assert f"of {MAX_MODELS + 5}" in condition.detail


def test_a_model_that_is_listed_twice_is_offered_once():
    assert len(probed("openai", {"data": [{"id": "m"}, {"id": "m"}]}).models) == 1


@pytest.mark.parametrize("tokens", [0, -1, True, "4096", 10**12, 1.5])
def test_an_impossible_context_length_counts_as_unknown(tokens):
    assert models(probed("openai", {"data": [{"id": "m", "max_model_len": tokens}]})) == {"m": (ALL, None)}


def test_only_an_agent_is_not_probed():
    assert [name for name, row in WORKER_TYPES.items() if row.probe_path is None] == ["agent"]
    with pytest.raises(ProbeFailed):
        WORKER_TYPES["agent"].read_probe(200, b"{}")


def test_no_connection_is_kept_to_what_may_be_llama_cpp():
    kept = {name for name, row in WORKER_TYPES.items() if row.keep_alive}
    assert kept == {"agent", "ollama", "vllm", "azure", "anthropic"}
    assert all(row.streams_always for row in WORKER_TYPES.values())


KEYS = [
    *("data", "models", "id", "name", "meta", "n_ctx", "details", "family", "type", "error", "root"),
    *("ftype", "quantization", "parameter_size", "quantization_level", "size", "state", "status", "value"),
    *("total_slots", "model_path", "is_processing", "is_sleeping", "server_load"),
]
json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False) | st.text(),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(KEYS) | st.text(max_size=5),
            inner,
            max_size=5,
        )
    ),
    max_leaves=25,
)


metrics = st.lists(
    st.sampled_from(
        [
            *("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc"),
            *("llamacpp:requests_processing", "llamacpp:requests_deferred"),
        ]
    ).flatmap(lambda name: st.floats().map(lambda value: f"{name} {value}\n"))
    | st.just('vllm:cache_config_info{block_size="16",num_gpu_blocks="999999999999"} 1.0\n'),
    max_size=5,
).map(lambda lines: "".join(lines).encode())


@settings(suppress_health_check=[HealthCheck.too_slow])  # on a busy machine, four such answers are
@given(
    name=st.sampled_from(sorted(WORKER_TYPES)),
    status=st.sampled_from([200, 204, 302, 401, 404, 500, 503]),
    body=st.binary(max_size=60) | json_values.map(orjson.dumps) | metrics,
    pages=st.lists(st.binary(max_size=60) | json_values.map(orjson.dumps) | metrics, min_size=3, max_size=3),
)
def test_any_answer_becomes_a_bounded_condition_or_one_failure(name, status, body, pages):
    try:
        condition = WORKER_TYPES[name].read_probe(status, body)
        for page, further in zip(WORKER_TYPES[name].more, pages, strict=False):
            condition = page.read(condition, status, further)
    except ProbeFailed as failure:
        assert str(failure).isprintable()
        assert len(str(failure)) < 400
        return
    assert condition.running is None or 0 <= condition.running <= 2 * MAX_REQUESTS
    assert condition.slots is None or 1 <= condition.slots <= MAX_REQUESTS
    assert all(1 <= len(m.name) <= MAX_NAME_CHARACTERS and m.name.isprintable() for m in condition.models)
    assert all(model.identity.isprintable() and len(model.identity) <= 120 for model in condition.models)
    assert all(model.load_seconds >= 0 for model in condition.models)
    assert condition.detail.isprintable()
