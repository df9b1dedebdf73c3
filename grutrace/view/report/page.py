"""The page of a report: one HTML file that needs neither scripts nor other files."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence

from grutrace.view.plots.axes import printable
from grutrace.view.report.finding import Finding
from grutrace.view.report.pictures import Picture
from grutrace.view.report.site_section import SiteSection

#: Bytes of all pictures together.
MAX_PICTURES = 3_800_000

#: Longest text of a trace in the page, in characters.
MAX_TEXT = 300

STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --paper: #fdfdfc; --soft: #5a626b;
  --line: #d5d9dd;  --card: #f4f5f6; --found: #b4540a; --clear: #1a7f5a; --unknown: #5a626b;
  --link: #0a5cad; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e7ea; --paper: #15181b; --soft: #a3abb3;
  --line: #363c42; --card: #1e2226; --found: #f0a35c; --clear: #5bc79c; --unknown: #a3abb3;
  --link: #7db8f2; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem; max-width: 62rem; background: var(--paper);
  color: var(--ink); font: 1rem/1.55 system-ui, sans-serif; overflow-wrap: anywhere; }
a { color: var(--link); }
:focus-visible { outline: 3px solid var(--link); outline-offset: 2px; }
.skip { position: absolute; left: -100rem; }
.skip:focus { left: 1rem; top: 1rem; background: var(--paper); padding: .5rem; }
h1 { font-size: 1.7rem; margin: 0 0 .3rem; }
h2 { font-size: 1.3rem; margin: 2.5rem 0 .5rem; border-bottom: 1px solid var(--line); }
h3 { font-size: 1.08rem; margin: 0 0 .4rem; }
.about, figcaption, .how { color: var(--soft); font-size: .9rem; }
article { border: 1px solid var(--line); border-left: .35rem solid var(--unknown);
  border-radius: 4px; padding: .9rem 1.1rem; margin: 1rem 0; }
article.found { border-left-color: var(--found); }
article.clear { border-left-color: var(--clear); }
.state { font-size: .8rem; font-weight: 600; margin-left: .6rem; color: var(--unknown); }
.found .state { color: var(--found); }
.clear .state { color: var(--clear); }
p, ul { margin: .35rem 0; }
ul { padding-left: 1.2rem; }
figure { margin: .8rem 0; }
figure svg, figure img { width: 100%; max-width: 44rem; height: auto; display: block; }
figure img { background: white; }
pre { margin: .4rem 0; padding: .5rem .7rem; background: var(--card); border-radius: 4px;
  white-space: pre-wrap; font-size: .82rem; }
table { border-collapse: collapse; font-size: .92rem; margin: .5rem 0; }
th, td { text-align: left; padding: .2rem .9rem .2rem 0; vertical-align: top;
  border-bottom: 1px solid var(--line); }
.pictures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr));
  gap: .5rem 1.5rem; }
@media print { body { max-width: none; font-size: 10pt; padding: 0; } article, figure, pre, tr
  { break-inside: avoid; } h2, h3 { break-after: avoid; } .skip, nav { display: none; }
  details > * { display: block; } }
"""


def text(value: object, longest: int = MAX_TEXT) -> str:
    """Return a text of the trace as text of a page: escaped, printable and bounded."""
    return html.escape(printable(str(value), longest), quote=True)


class Page:
    """Collects the parts of a page and counts the bytes of its pictures."""

    def __init__(self) -> None:
        self._left = MAX_PICTURES
        self.left_out = 0

    def picture(self, picture: Picture) -> str:
        """Return a figure, or nothing if the page would become too large."""
        if picture.size > self._left:
            self.left_out += 1
            return ""
        self._left -= picture.size
        return f"<figure>{picture.markup}<figcaption>{text(picture.alt)}</figcaption></figure>"

    def finding(self, finding: Finding, number: int) -> str:
        """Return a finding as an article."""
        sentences = "".join(f"<li>{text(sentence, 1000)}</li>" for sentence in finding.sentences)
        how = f'<p class="how">{text(finding.how, 1000)}</p>' if finding.how else ""
        pictures = "".join(map(self.picture, finding.pictures))
        return (
            f'<article class="{finding.state}" id="finding-{number}"><h3>{text(finding.topic)}'
            f'<span class="state">{text(finding.answer)}</span></h3><ul>{sentences}</ul>'
            f"{pictures}{how}{_commands(finding.commands)}</article>"
        )

    def section(self, section: SiteSection, number: int) -> str:
        """Return the section of a site."""
        facts = "".join(
            f'<tr><th scope="row">{text(name)}</th><td>{text(fact)}</td></tr>'
            for name, fact in section.facts.items()
        )
        pictures = "".join(
            f"<div>{figure}{_commands([command])}</div>"
            for picture, command in section.pictures
            if (figure := self.picture(picture))
        )
        return (
            f'<section aria-labelledby="site-{number}"><h2 id="site-{number}">{text(section.name)}'
            f'</h2><table>{facts}</table><div class="pictures">{pictures}</div></section>'
        )


def _commands(commands: Iterable[str]) -> str:
    lines = "\n".join(text(command, 1000) for command in commands)
    return f"<pre><code>{lines}</code></pre>" if lines else ""


def render(
    title: str,
    about: Sequence[str],
    findings: Sequence[Finding],
    sections: Sequence[SiteSection],
    others: Sequence[str],
    more: int,
) -> str:
    """Return the page.

    Args:
        title: The title.
        about: Sentences about the trace.
        findings: The findings.
        sections: The sections of the sites.
        others: Lines about sites without a section.
        more: Number of sites that are not even listed.
    """
    page = Page()
    found = [page.finding(finding, number) for number, finding in enumerate(findings)]
    sites = [page.section(section, number) for number, section in enumerate(sections)]
    links = "".join(
        f'<li><a href="#site-{number}">{text(section.name, 60)}</a></li>'
        for number, section in enumerate(sections)
    )
    summary = "".join(
        f'<li><a href="#finding-{number}">{text(finding.topic)}</a>'
        f'<span class="state">{text(finding.answer)}</span></li>'
        for number, finding in enumerate(findings)
    )
    rest = "".join(f"<li>{text(line)}</li>" for line in others)
    rest += f"<li>{more:,} more sites</li>" if more else ""
    rest = f'<h2 id="others">Sites without a section</h2><ul>{rest}</ul>' if rest else ""
    note = (
        f"<p>{page.left_out} pictures were left out to keep the page below 5 MiB.</p>"
        if page.left_out
        else ""
    )
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; '
        "style-src 'unsafe-inline'; img-src data:\">"
        f"<title>{text(title)}</title><style>{STYLE}</style></head><body>"
        '<a class="skip" href="#findings">Skip to the findings</a>'
        f"<header><h1>{text(title)}</h1>"
        + "".join(f'<p class="about">{text(line)}</p>' for line in about)
        + f'</header><nav aria-label="Contents"><ul>{summary}</ul>'
        + (f"<p>Sites:</p><ul>{links}</ul>" if links else "")
        + f'</nav><main><h2 id="findings">Findings</h2>{"".join(found)}{note}{"".join(sites)}{rest}'
        "</main></body></html>\n"
    )
