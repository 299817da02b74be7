import pytest
from hypothesis import given
from hypothesis import strategies as st

from sloth_plugins.errors import SlothError
from sloth_plugins.selection import check_names, decide, parse

CATALOGUE = {"llama": ("rms_norm", "rope", "glu"), "qwen": ("rms_norm", "qk_norm_rope"), "gemma": ("rms_norm", "geglu")}


def selected(text, architecture="llama", patch="rope", *, default=True):
    return decide(parse(text), architecture, patch, default=default).selected


@pytest.mark.parametrize("text", [None, "", "0", "off", "OFF", "false", "no", " "])
def test_off_selects_nothing(text):
    assert parse(text).is_off
    assert not selected(text)


@pytest.mark.parametrize(
    "text", ["1", "on", "ON", "true", "yes", "*", "llama", "l*", "ll?ma", "llama:rope", "*:rope", " 1\n"]
)
def test_forms_that_select_a_default_patch(text):
    assert selected(text)


@pytest.mark.parametrize(
    ("text", "chosen"),
    [
        ("llama:rms_norm+rope", {"llama:rms_norm", "llama:rope"}),
        (
            "1,-*:glu",
            {"llama:rms_norm", "llama:rope", "qwen:rms_norm", "qwen:qk_norm_rope", "gemma:rms_norm", "gemma:geglu"},
        ),
        ("-gemma*", {"llama:rms_norm", "llama:rope", "llama:glu", "qwen:rms_norm", "qwen:qk_norm_rope"}),
        ("llama,-*:rms_norm,qwen:rms_norm", {"llama:rope", "llama:glu", "qwen:rms_norm"}),
        ("qwen", {"qwen:rms_norm", "qwen:qk_norm_rope"}),
        ("*:*norm*", {"llama:rms_norm", "qwen:rms_norm", "qwen:qk_norm_rope", "gemma:rms_norm"}),
        ("-llama,llama:glu", {"llama:glu", "qwen:rms_norm", "qwen:qk_norm_rope", "gemma:rms_norm", "gemma:geglu"}),
    ],
)
def test_the_last_matching_term_wins(text, chosen):
    selection = parse(text)
    found = {f"{a}:{p}" for a, patches in CATALOGUE.items() for p in patches if decide(selection, a, p).selected}
    assert found == chosen


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1", False),
        ("llama", False),
        ("llama:*", False),
        ("llama:fp8", True),
        ("*:fp?", True),
        ("llama:fp8,-*:fp8", False),
    ],
)
def test_a_patch_that_is_off_by_default_needs_its_name(text, expected):
    assert selected(text, patch="fp8", default=False) is expected


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("1", False),
        ("llama", False),
        ("llama:*", False),
        ("llama:rop?", False),
        ("llama:rope", True),
        ("*:rope,1", True),
    ],
)
def test_only_a_written_name_must_apply(text, named):
    assert decide(parse(text), "llama", "rope").named is named


@pytest.mark.parametrize(
    ("text", "quoted"),
    [
        ("llama,,qwen", "empty term"),
        ("llama,", "empty term"),
        (",", "empty term"),
        ("llama:", "empty patch"),
        ("llama:rope+", "empty patch"),
        ("llama rope", "'llama rope'"),
        ("llama:ro pe", "'ro pe'"),
        ("Llama", "did you mean 'llama'"),
        ("llama:RMS-Norm", "did you mean 'llama:rms_norm'"),
        ("llama: rope", "did you mean 'llama:rope'"),
        ("-", "'-'"),
        ("--llama", "'--llama'"),
        ("llama::rope", "':rope'"),
        ("1,off", "'off'"),
        ("llama;qwen", "'llama;qwen'"),
    ],
)
def test_what_cannot_be_read_is_quoted_in_one_line(text, quoted):
    with pytest.raises(SlothError) as caught:
        parse(text)
    assert quoted in str(caught.value)
    assert repr(text) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("lama", "did you mean 'llama'"),
        ("-gema", "did you mean 'gemma'"),
        ("llama:ropes", "did you mean 'rope'"),
        ("llama:geglu", "no patch of llama"),
        ("1,-*:gluu", "did you mean 'glu'"),
        ("mistral*", "no architecture matches 'mistral*'"),
        ("-1", "no architecture matches '1' (known"),
    ],
)
def test_an_unknown_name_gets_the_nearest_one(text, said):
    with pytest.raises(SlothError) as caught:
        check_names(parse(text), CATALOGUE)
    assert said in str(caught.value)
    assert "known:" in str(caught.value)


@given(st.text(alphabet="abcl*?-:+,_01 \n\x00é", max_size=30))
def test_any_text_is_read_or_refused_in_one_line(text):
    try:
        selection = parse(text)
    except SlothError as error:
        assert len(str(error).splitlines()) == 1  # noqa: PT017 - either outcome is right, each has its own claim
        return
    for architecture, patches in CATALOGUE.items():
        for patch in patches:
            decision = decide(selection, architecture, patch)
            assert decision.selected or not decision.named


names = st.sampled_from(["llama", "qwen", "gemma", "*", "l*", "?wen"])
patches = st.lists(st.sampled_from(["rms_norm", "rope", "glu", "*", "r*"]), max_size=3)


@given(st.lists(st.tuples(st.booleans(), names, patches), min_size=1, max_size=5))
def test_every_well_formed_selection_means_what_its_last_matching_term_says(terms):
    from fnmatch import fnmatchcase

    text = ",".join(("-" if away else "") + arch + (":" + "+".join(ps) if ps else "") for away, arch, ps in terms)
    expected = terms[0][0]
    for away, arch, ps in terms:
        if fnmatchcase("llama", arch) and (not ps or any(fnmatchcase("rope", p) for p in ps)):
            expected = not away
    assert selected(text) is expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [("qwen", True), ("qwen3", True), ("qwen2", False), ("qwen*:rope", True), ("1,-qwen", False), ("1,-qwen2", True)],
)
def test_a_family_or_one_of_its_architectures(text, expected):
    assert decide(parse(text), "qwen3", "rope", family="qwen").selected is expected


def test_a_patch_named_through_its_family_is_named():
    assert decide(parse("qwen:rope"), "qwen3", "rope", family="qwen").named
    assert not decide(parse("qwen"), "qwen3", "rope", family="qwen").named
