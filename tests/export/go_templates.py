"""Go's text/template: the real one where a `go` is on PATH, and an evaluator of the part that Modelfiles use."""

import json
import re
import shutil
import subprocess

ACTION = re.compile(r"\{\{ (.*?) \}\}")
WORD = re.compile(r'"[^"]*"|[()]|[^\s()]+')

PROGRAM = """
package main

import (
	"encoding/json"
	"os"
	"text/template"
)

type Message struct{ Role, Content string }
type Case struct {
	Template, System string
	Messages         []Message
}

func main() {
	var cases []Case
	if err := json.NewDecoder(os.Stdin).Decode(&cases); err != nil {
		panic(err)
	}
	results := []string{}
	for _, c := range cases {
		out := new(writer)
		values := map[string]any{"System": c.System, "Messages": c.Messages}
		if err := template.Must(template.New("").Parse(c.Template)).Execute(out, values); err != nil {
			panic(err)
		}
		results = append(results, string(*out))
	}
	json.NewEncoder(os.Stdout).Encode(results)
}

type writer []byte

func (w *writer) Write(p []byte) (int, error) {
	*w = append(*w, p...)
	return len(p), nil
}
"""


def go() -> str | None:
    return shutil.which("go")


def render_by_go(cases: list[dict], folder) -> list[str]:
    """What Go makes of each {template, system, messages}."""
    file = folder / "main.go"
    file.write_text(PROGRAM)
    given = json.dumps([{key.capitalize(): value for key, value in case.items()} for case in cases])
    done = subprocess.run([go(), "run", str(file)], input=given, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def render(template: str, system: str, messages: list[dict[str, str]]) -> str:
    """The same by our own evaluator, which knows if, else if, range, eq, le, and, len and slice."""
    root = {"System": system, "Messages": [{"Role": m["role"], "Content": m["content"]} for m in messages]}
    tokens = [piece for pair in _pairs(template) for piece in pair]
    text, rest = _block(tokens, {".": root, "$": root})
    assert not rest
    return text


def _pairs(template):
    at = 0
    for match in ACTION.finditer(template):
        yield ("text", template[at : match.start()]), ("action", match[1])
        at = match.end()
    yield ("text", template[at:]), ("text", "")


def _block(tokens, scope):
    """Text up to an `else` or `end`, which begins the rest."""
    out = ""
    while tokens:
        (kind, value), tokens = tokens[0], tokens[1:]
        if kind == "text":
            out += value
        elif value.startswith(("else", "end")):
            return out, [("action", value), *tokens]
        elif value.startswith("if "):
            text, tokens = _if(value[3:], tokens, scope)
            out += text
        elif value.startswith("range "):
            text, tokens = _range(value[6:], tokens, scope)
            out += text
        else:
            out += str(_value(value, scope))
    return out, []


def _if(condition, tokens, scope):
    holds = bool(_value(condition, scope))
    text, tokens = _block(tokens, scope)
    kept = text if holds else ""
    (_, value), tokens = tokens[0], tokens[1:]
    while value != "end":
        if value == "else":
            text, tokens = _block(tokens, scope)
            kept = kept if holds else text
            (_, value), tokens = tokens[0], tokens[1:]
            assert value == "end"
        else:
            text, tokens = _if(value.removeprefix("else if "), tokens, scope)
            return (kept if holds else text), tokens
    return kept, tokens


def _range(header, tokens, scope):
    names, _, over = header.rpartition(":= ")
    names = re.findall(r"\$\w+", names)
    out, after = "", None
    for n, item in enumerate(_value(over, scope)):
        inner = {**scope, ".": item, **dict(zip(names, (n, item), strict=False))}
        text, after = _block(tokens, inner)
        out += text
    if after is None:
        _, after = _block(tokens, {**scope, ".": {"Role": "", "Content": ""}, **dict.fromkeys(names, 0)})
    assert after[0][1] == "end"
    return out, after[1:]


def _value(expression, scope):
    words = WORD.findall(expression)
    value, rest = _term(words, scope)
    assert not rest, expression
    return value


FUNCTIONS = {
    "eq": lambda a, b: a == b,
    "le": lambda a, b: a <= b,
    "and": lambda *values: next((value for value in values if not value), values[-1]),
    "len": len,
    "slice": lambda items, start: items[start:],
}


def _term(words, scope):
    word = words[0]
    if word not in FUNCTIONS:
        return _operand(words, scope)
    rest, arguments = words[1:], []
    while rest and rest[0] != ")":
        argument, rest = _operand(rest, scope)
        arguments.append(argument)
    return FUNCTIONS[word](*arguments), rest


def _operand(words, scope):
    word, rest = words[0], words[1:]
    if word == "(":
        value, rest = _term(rest, scope)
        assert rest[0] == ")"
        return value, rest[1:]
    if word.startswith('"'):
        return json.loads(word), rest
    if word.isdigit():
        return int(word), rest
    if word in scope:
        return scope[word], rest
    base, _, name = word.partition(".")
    return scope[base or "."][name], rest
