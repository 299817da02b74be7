# ruff: noqa: E501, RUF001 - real text has long lines and letters of many scripts
"""Real text on which two tokenizers are compared: what splits differently shows on these lines."""

PROBE = (
    "The quick brown fox doesn't jump; it's tired, and they'd rather we'll wait. I'M SURE YOU'VE SEEN IT.",
    "def f(x: int, *, y=0.5) -> dict[str, list[int]]:  # comment\n\treturn {k: v for k, v in enumerate([x] * 10)}\n\n",
    '    if (a && b || !c) { return "don\'t\\n"; }\r\n    else { printf("%5.2f\\t%s", 3.14159, "x"); }\r\n\r\n',
    "In 2024, 1234567 people paid $1,234.56 (about €1 100) for 3x2=6 items; 12:30, 2024-11-21, v1.2.3-rc4, 0xDEADBEEF.",
    "Ünïcödé: naïve café, Straße, Łódź, Ελληνικά, кириллица, עברית, العربية, हिन्दी, ไทย, 日本語のテキスト、한국어 문장입니다.",
    "中文文本：今天天气很好，我们去公园吧！价格是１２３元。“引号”《书名》——破折号……",
    "Emoji 🦥🔥👩‍👩‍👧‍👦🇩🇪👍🏽 and symbols ∑∫√≠∞ ™©® ½ ² ₃ Ⅳ ① … – — “q” ‘s’ «x»",
    "   leading, trailing   \n\n\n \t \n  mixed \u00a0\u2003\u3000 spaces\u200b and\u00adhyphens   ",
    "https://example.org/path/to?q=a%20b&c=d#e  user@example.com  C:\\Users\\me\\file.txt  ~/a/b/../c.tar.gz",
    "camelCaseWords HTTPServer XMLHttpRequest snake_case_word kebab-case iPhone15Pro eBay McDonald's O'Neill rock'n'roll",
    "<b>bold</b> &amp; [link](url) **strong** `code` ~~gone~~ # Title\n- item\n1. one\n| a | b |\n|---|---|\n$$E=mc^2$$",
    'SELECT * FROM t WHERE a<>\'b\' AND c!=1;--x\n{"key": [1, 2.0, null, true], "k2": "v\\u00e9"}\n#!/bin/sh\nx=$((1+2))\n',
)
"""Lines of prose, code, scripts, digits, emoji and odd spaces."""
