"""The page of models and adapters is complete, and twenty of its names are what it says."""

import pytest

from tests.architectures import adapters, cases, compare, page

NAMES = (
    "bart", "bert", "cohere", "falcon_h1", "gemma2", "gemma3", "gpt2", "gpt_oss", "granitemoehybrid",
    "hyperclovax", "jetmoe", "llama", "llama4", "mamba2", "musicgen", "prophetnet", "qwen2_moe", "qwen3_5",
    "recurrent_gemma", "xlnet",
)  # fmt: skip
ADAPTERS = (
    *adapters.all_cases(["LORA"]),
    *(adapters.Case(method, adapters.HEAD, adapters.ORDERS[1]) for method in ("ADALORA", "IA3", "VBLORA")),
    *(adapters.Case(m, adapters.BODY, adapters.ORDERS[0]) for m in ("OFT", "PREFIX_TUNING", "PROMPT_TUNING")),
)
FUSE, HEAD, PROBE = "ual/models/fuse.py", "ual/models/head.py", "ual/models/probe.py"
pytestmark = pytest.mark.filterwarnings("ignore")  # other libraries warn of unusual configurations


@pytest.mark.kills(
    FUSE, "shift = shift_labels is None and settings.form.shifts_labels", "shift = True", only="bart"
)
@pytest.mark.kills(FUSE, "loss=value + probe.router_loss(model, outputs)", "loss=value", only="qwen2_moe")
@pytest.mark.kills(PROBE, '(model, "aux_loss_coef")', '(model, "no_such_name")', only="jetmoe")
@pytest.mark.kills(
    PROBE, "scale, top = (logits[1, 0] / chosen[1, 0]).item()", "scale, top = 1.0", only="hyperclovax"
)
@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_what_the_page_says(name: str) -> None:
    result = page.shown(*compare.check(name, cases.CAUSAL_LM[name]))
    assert result == page.read()[page.CAUSAL_LM, name]


@pytest.mark.kills(HEAD, "if plain_class(module).forward is not nn.Linear.forward:", "if False:")
@pytest.mark.parametrize("case", ADAPTERS, ids=str)
def test_an_adapter_works_or_is_refused(case: adapters.Case) -> None:
    outcome, reason = adapters.check(case)
    refused = case.place == adapters.HEAD and case.method != "LORA"
    assert outcome == (page.REFUSED if refused else page.WORKS), reason
    assert not refused or "peft" in reason


def test_the_page_has_every_name() -> None:
    """If this fails after an update of transformers, run `make architectures` and commit the page."""
    names = {(kind, name) for kind, name in page.everything() if kind != page.ADAPTER}
    assert names == page.read().keys()
    methods = {method.split()[0] for method in adapters.METHODS}
    assert methods == {method.value for method in adapters.PEFT_TYPE_TO_CONFIG_MAPPING}


def test_no_name_of_the_page_is_wrong() -> None:
    results = page.read().values()
    assert not [result for result in results if result.startswith((page.WRONG, page.CRASHES))]
