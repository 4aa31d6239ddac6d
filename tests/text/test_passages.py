import pytest

from dsv4.text.passages import OWN, THREE_LEVELS, TWO_LEVELS, Passages, find_passages, read_passages
from dsv4.text.tokens import DSML, THINK

APRIL = '''
"""A docstring with {tool_schemas}."""
import json
raise SystemExit("must not run")
dsml_token: str = "\uff5cDSML\uff5c"
thinking_start_token = "<think>"
tool_call_template = '<{dsml_token}invoke name="{name}">'
TOOLS_TEMPLATE = """## Tools

Write <{dsml_token}tool_calls> after {start} like {{"a": 1}}.
{tool_schemas}
""" + "The end.\\n"
response_format_template: str = "## Format:\\n" "{schema}"
REASONING_EFFORT_MAX = (
    "Think {hard}.\\n"
    f"{thinking_start_token}\\n\\n"
)
nothing: str

def render(tools):
    return TOOLS_TEMPLATE.format(tool_schemas=tools, dsml_token=dsml_token, start=thinking_start_token)
'''


def write(folder, text, name="encoding_any.py"):
    (folder / "encoding").mkdir(exist_ok=True)
    (folder / "encoding" / name).write_text(text, encoding="utf-8")
    return folder / "encoding"


def test_passages_are_read_and_never_run(tmp_path):
    passages = read_passages(write(tmp_path, APRIL))
    assert passages.tools == (
        f'## Tools\n\nWrite <{DSML}tool_calls> after {THINK} like {{"a": 1}}.\n{{tool_schemas}}\nThe end.\n'
    )
    assert passages.response_format == "## Format:\n{schema}"
    assert passages.efforts == {"high": "", "max": f"Think {{hard}}.\n{THINK}\n\n"}
    assert passages.mapping == TWO_LEVELS
    assert find_passages(tmp_path) == passages


@pytest.mark.parametrize(
    "levels",
    [
        'EFFORT_PROMPTS = {"low": "", "high": "Hard.", "max": "Harder."}\nDEFAULT_EFFORT = "low"',
        'EFFORT_PROMPTS = {"low": None, "high": "Hard.", "max": "Harder."}',
        'REASONING_EFFORT_LOW = ""\nREASONING_EFFORT_HIGH = "Hard."\nREASONING_EFFORT_MAX = "Harder."',
        'REASONING_EFFORT_HIGH = "Hard."\nREASONING_EFFORT_MAX = "Harder."',
        'EFFORT_MAX = "max"\nEFFORT_PROMPTS = {"low": "", "high": "Hard.", EFFORT_MAX: "Harder."}',
    ],
)
def test_later_releases_have_three_levels(tmp_path, levels):
    text = APRIL.replace("REASONING_EFFORT_MAX", "UNUSED") + levels
    passages = read_passages(write(tmp_path, text))
    assert passages.efforts == {"low": "", "high": "Hard.", "max": "Harder."}
    assert passages.mapping == THREE_LEVELS
    assert [passages.effort_prefix(word) for word in ("minimal", "medium", "xhigh", "ultra")] == [
        "", "Hard.", "Hard.", "Harder.",
    ]  # fmt: skip


def test_a_template_with_other_braces_stays_as_it_is(tmp_path):
    text = APRIL.replace('{{"a": 1}}', '{"a": {{1}}}').replace("{dsml_token}tool", "tool").replace("{start}", "")
    assert 'like {"a": {{1}}}.\n{tool_schemas}\n' in read_passages(write(tmp_path, text)).tools


def test_constants_may_be_in_several_files(tmp_path):
    head, tail = APRIL.split("response_format_template", 1)
    write(tmp_path, head, "a.py")
    folder = write(tmp_path, "response_format_template" + tail, "b.py")
    folder.joinpath("b.py").write_text('thinking_start_token = "<think>"\n' + folder.joinpath("b.py").read_text())
    assert read_passages(folder).response_format == "## Format:\n{schema}"


def test_all_that_is_missing_is_named_with_the_file(tmp_path):
    with pytest.raises(ValueError, match=r"encoding_any\.py: .*tool_schemas.*schema.*REASONING_EFFORT_MAX"):
        read_passages(write(tmp_path, "X = 1\nTOOLS = 'no place'\n"))
    with pytest.raises(ValueError, match=r"TOOLS_TEMPLATE has a field \{dsml_token\}"):
        read_passages(write(tmp_path, APRIL.replace("dsml_token: str", "other: str")))
    with pytest.raises(ValueError, match="effort low, but none that of high"):
        read_passages(write(tmp_path, APRIL + 'REASONING_EFFORT_LOW = "Be brief."\n'))
    with pytest.raises(ValueError, match=r"encoding_any\.py cannot be parsed"):
        read_passages(write(tmp_path, "def"))
    with pytest.raises(ValueError, match="no Python files"):
        read_passages(tmp_path)


def test_models_without_an_encoder_have_ours(tmp_path):
    assert find_passages(tmp_path) is OWN
    write(tmp_path, "text", "README.md")
    assert find_passages(tmp_path) is OWN
    assert len(OWN.tools.split()) <= 60
    assert OWN.efforts["high"] == "" != OWN.efforts["max"]


def test_passages_check_themselves():
    with pytest.raises(ValueError, match="passage tools is 'x'"):
        Passages(tools="x", response_format="{schema}", efforts={}, mapping={})
    with pytest.raises(ValueError, match="passage response_format is 'x'"):
        Passages(tools="{tool_schemas}", response_format="x", efforts={}, mapping={})
    with pytest.raises(ValueError, match="effort high has level 'far'"):
        Passages(tools="{tool_schemas}", response_format="{schema}", efforts={"a": ""}, mapping={"high": "far"})
    with pytest.raises(ValueError, match="effort is 'huge'; expected one of minimal, low"):
        OWN.effort_prefix("huge")
