"""A model's text on the page: Markdown, code and mathematics, and nothing that does anything."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.page import fake
from tests.page.conftest import Served, say
from tests.serve.conftest import serving

sync_api = pytest.importorskip("playwright.sync_api")
expect = getattr(sync_api, "expect", None)
Start, Browse = Callable[..., Served], Callable[..., Any]

SHOW = """async ([pieces, wait]) => {
  const script = document.querySelector('script[type="module"]').src;
  const { Markdown } = await import(script.replace('app.js', 'markdown.js'));
  const box = document.createElement('div');
  box.className = 'prose trial';
  document.querySelectorAll('.trial').forEach((old) => old.remove());
  document.querySelector('#main').append(box);
  const shown = new Markdown(box);
  for (const text of pieces) shown.show(text);
  for (let n = 0; wait && n < 200 && !box.querySelector(wait); n++) await new Promise((go) => setTimeout(go, 10));
  return box.innerHTML;
}"""


@pytest.fixture(scope="module")
def anywhere() -> Any:
    with serving(fake.create()) as server:
        yield server


@pytest.fixture
def shown(anywhere: Any, browse: Browse) -> Callable[..., str]:
    """`shown(text, …)`: the HTML of an element after it showed the texts one after another."""
    page = browse(anywhere.url)
    page.trial = page.locator(".trial")

    def show(*texts: str, wait: str = "") -> str:
        return str(page.evaluate(SHOW, [list(texts), wait]))

    show.page = page  # type: ignore[attr-defined]
    return show


def test_markdown(shown: Callable[..., str]) -> None:
    html = shown(
        "# Big\n\nA *b* **c** `d<e` ~~f~~ [g](https://h.example/?a=1&b=2)\n\n- x\n  1. y\n\n> z\n\n| a | b |\n|--:|---|\n| 1 | 2<br>3 |\n\n- [x] done\n\nH<sub>2</sub>O & <b>bold</b>"
    )
    for part in (
        "<h3>Big</h3>", "<em>b</em>", "<strong>c</strong>", "<code>d&lt;e</code>", "<del>f</del>", "<blockquote>", "<ol>", "☑ done",
        'href="https://h.example/?a=1&amp;b=2"', 'rel="noopener noreferrer nofollow"', 'target="_blank"', "H<sub>2</sub>O &amp;",
        '<td align="right">1</td>', "2<br>3", "&lt;b&gt;bold&lt;/b&gt;",
    ):  # fmt: skip
        assert part in html, (part, html)


def test_code(shown: Callable[..., str]) -> None:
    html = shown("```python\ndef f(x):\n    return '$x$'\n```\n\n```no-such\n<i>\n```", wait=".hljs-keyword")
    assert '<span class="hljs-keyword">def</span>' in html and "&lt;i&gt;" in html and "math" not in html
    page = shown.page  # type: ignore[attr-defined]
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.locator(".trial").get_by_role("button", name="Copy code").first.click()
    expect(page.locator("#announcer")).to_contain_text("Copied")
    assert page.evaluate("() => navigator.clipboard.readText()") == "def f(x):\n    return '$x$'"


FORMULAS: list[tuple[str, list[str]]] = [
    ("a $x^2$ b", ["x^2"]),
    (r"a \(x_1\) b", ["x_1"]),
    ("$$\na = b\n$$", ["\na = b\n"]),
    ("\\[\na = b\n\\]\n\nand", ["\na = b\n"]),
    ("so $$a$$ in a line", ["a"]),
    (r"so \[a\] in a line", ["a"]),
    ("- in a list: $a_i$\n\n  $$b$$", ["a_i", "b"]),
    (r"$a \$ b$", [r"a \$ b"]),
    ("| $a$ |\n|---|\n| $b$ |", ["a", "b"]),
    ("it costs $5 or $6, US$7 and AU$8", []),
    ("`$x$` and ``\\(y\\)``", []),
    ("```\n$x$\n$$y$$\n```", []),
    ("    $x$", []),
    (r"\$x\$ and \$5", []),
    ("$ x $", []),
    ("a $`b`$ c", []),
    ("open $$ for ever", []),
    ("**$a$ bold**", ["a"]),
]


def test_mathematics_is_found(shown: Callable[..., str]) -> None:
    page = shown.page  # type: ignore[attr-defined]
    for text, formulas in FORMULAS:
        shown(text, wait=".katex" if formulas else "")
        found = page.locator(".trial .katex-mathml annotation").all_text_contents()
        assert [tex.strip() for tex in found] == [tex.strip() for tex in formulas], text
        assert page.locator(".trial .math").count() == len(formulas), text


def test_mathematics_is_set(shown: Callable[..., str]) -> None:
    shown(
        r"$$\left\{\begin{matrix}1\\2\\3\\4\\5\\6\end{matrix}\right. \color{red}{x} \sqrt{\frac{a}{b}}$$",
        wait=".katex",
    )
    page = shown.page  # type: ignore[attr-defined]
    page.evaluate("() => document.fonts.ready")
    box = page.locator(".trial .katex-html").bounding_box()
    assert box["height"] > 100
    red = page.locator(".trial .katex-html .mord", has_text="x").last
    assert red.evaluate("(e) => getComputedStyle(e).color") == "rgb(255, 0, 0)"
    shown(r"$\frac{1}$", wait=".math-broken")
    assert page.locator(".trial .math").inner_text() == r"\frac{1}"


HOSTILE = [
    "<script>window.hit = 1</script>",
    "<img src=x onerror='window.hit = 1'>",
    "<svg onload=window.hit=1><animate onbegin=window.hit=1>",
    "<iframe srcdoc='<script>parent.hit = 1</script>'></iframe>",
    "<a href='javascript:window.hit=1'>a</a>",
    "[a](javascript:window.hit=1)",
    "[a](JaVaScRiPt&colon;window.hit=1)",
    "[a](\x01javascript:window.hit=1)",
    "[a](java\nscript:window.hit=1)",
    "[a](data:text/html,<script>window.hit=1</script>)",
    "[a](vbscript:x)",
    "[a](file:///etc/passwd)",
    "[a][b]\n\n[b]: javascript:window.hit=1",
    "<javascript:window.hit=1>",
    "![a](https://evil.example/x.png?secret)",
    "![a](data:image/svg+xml,<svg onload=window.hit=1>)",
    '![a" onerror="window.hit=1](x)',
    '[a](https://x.example "t\\" onmouseover=\\"window.hit=1")',
    '[a](https://x.example/"onmouseover="window.hit=1)',
    '```js" onmouseover="window.hit=1\nx\n```',
    '```"><img src=x onerror=window.hit=1>\nx\n```',
    "`<img src=x onerror=window.hit=1>`",
    "<pre><code><img src=x onerror=window.hit=1></code></pre>",
    "<style>* { display: none }</style>",
    "<base href='https://evil.example/'>",
    "<form action='https://evil.example'><button>x</button></form>",
    "<meta http-equiv=refresh content='0;url=https://evil.example'>",
    "<span class='math'>\\href{javascript:window.hit=1}{x}</span>",
    "$\\href{javascript:window.hit=1}{x}$",
    "$\\url{javascript:window.hit=1}$",
    "$\\htmlData{x=y}{x} \\htmlStyle{color: red}{x} \\htmlClass{drawer}{x} \\htmlId{ask}{x}$",
    "$\\includegraphics{https://evil.example/x.png}$",
    "$<img src=x onerror=window.hit=1>$",
    "$$\\text{</span><img src=x onerror=window.hit=1>}$$",
    "$\\def\\x{\\x\\x}\\x$",
    "<math><mtext><table><mglyph><style><img src=x onerror=window.hit=1></style></mglyph></table></mtext></math>",
    "<noscript><p title='</noscript><img src=x onerror=window.hit=1>'></noscript>",
    "<br onmouseover=window.hit=1>",
    "<kbd onclick=window.hit=1>x</kbd>",
    "<details open ontoggle=window.hit=1>",
    "<a id=ask name=thread>clobbered</a>",
    "<!--<img src=--><img src=x onerror=window.hit=1>",
    "</article></section><img src=x onerror=window.hit=1>",
    "&lt;img src=x onerror=window.hit=1&gt;",
    '<https://x.example/" onmouseover="window.hit=1>',
    "https://x.example/'onmouseover='window.hit=1",
]
LOOK = """() => {
  const found = [];
  const box = document.querySelector('.trial');
  for (const e of box.querySelectorAll('*')) {
    if (/^(script|style|img|iframe|object|embed|base|form|meta|link|audio|video|animate|input)$/i.test(e.tagName)) found.push(e.tagName);
    for (const a of e.attributes) {
      if (/^on/i.test(a.name) || a.name === 'srcdoc') found.push(a.name);
      if (['href', 'src', 'action', 'xlink:href'].includes(a.name) && !/^(https?:|mailto:|#icon-)/.test(a.value)) found.push(a.value);
      if (a.name === 'id' || (a.name === 'class' && /drawer/.test(a.value))) found.push(a.value);
    }
    for (const name of ['click', 'mouseover', 'toggle']) if (e.tagName !== 'A' && e.tagName !== 'BUTTON') e.dispatchEvent(new MouseEvent(name));
  }
  if (window.hit) found.push('it ran');
  return found;
}"""


def test_hostile_text_does_nothing(shown: Callable[..., str]) -> None:
    """Each alone, each built up letter by letter, and all in one text."""
    page = shown.page  # type: ignore[attr-defined]
    shown("$x$", wait=".katex")
    for text in HOSTILE:
        shown(text)
        assert page.evaluate(LOOK) == [], text
        shown(*(text[:n] for n in range(1, len(text), 3)), text)
        assert page.evaluate(LOOK) == [], text
    shown("\n\n".join(HOSTILE))
    assert page.evaluate(LOOK) == []
    page.wait_for_timeout(50)
    assert page.evaluate(LOOK) == []


def test_hostile_text_from_the_server(puppet: Start, browse: Browse) -> None:
    """In each place where a model's words are shown."""
    bad = "<img src=x onerror=window.hit=1>"
    server = puppet(f"{bad}</think>{bad}\n\n[a](javascript:window.hit=1)")
    page = browse(server.url)
    say(page, bad)
    page.locator(".reasoning summary").click()
    expect(page.locator(".thoughts")).to_have_text(bad)
    expect(page.locator(".bubble")).to_have_text(bad)
    expect(page.locator(".talk")).to_have_text(bad)
    assert page.locator("img").count() == 0 and page.locator(".answer a").count() == 0
    assert page.evaluate("() => window.hit") is None


def test_the_policy_stands_behind_it(anywhere: Any, browse: Browse) -> None:
    """Even a hole in all of the above would run nothing: no inline scripts, no HTML from strings, no other hosts."""
    page = browse(anywhere.url, allowed=("Security Policy", "TrustedHTML", "error"))
    tried = page.evaluate(
        """async () => {
        const said = [];
        try { document.body.innerHTML += '<img src=x onerror="window.hit = 1">'; } catch (error) { said.push(error.name); }
        const script = document.createElement('script');
        try { script.text = 'window.hit = 1'; document.body.append(script); } catch (error) { said.push(error.name); }
        const button = document.createElement('button');
        try { button.setAttribute('onclick', 'window.hit = 1'); button.click(); } catch (error) { said.push(error.name); }
        try { await fetch('http://127.0.0.2:9/'); } catch (error) { said.push(error.name); }
        return [said, window.hit];
    }"""
    )
    assert tried == [["TypeError"] * 4, None]


def test_a_long_answer_is_not_made_anew_each_time(shown: Callable[..., str]) -> None:
    """Blocks that did not change stay the elements they were; a link's address told later reaches them."""
    page = shown.page  # type: ignore[attr-defined]
    text = "First [a][1].\n\nSecond.\n\nThird"
    kept = page.evaluate(
        """async ([text]) => {
        const script = document.querySelector('script[type="module"]').src;
        const { Markdown } = await import(script.replace('app.js', 'markdown.js'));
        const box = document.createElement('div');
        const shown = new Markdown(box);
        shown.show(text);
        const [one, two, three] = box.children;
        shown.show(text + ' grows');
        const same = [...box.children].map((e, n) => e === [one, two, three][n]);
        shown.show(text + ' grows\\n\\n[1]: https://h.example/');
        return [same, box.querySelector('a')?.href, box.children[2].textContent];
    }""",
        [text],
    )
    assert kept == [[True, True, False], "https://h.example/", "Third grows"]
