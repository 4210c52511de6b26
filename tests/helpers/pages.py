"""Reads the pages of the documentation: their code blocks, their commands and their links."""

import pathlib
import re
import shlex
from typing import NamedTuple

ROOT = pathlib.Path(__file__).parents[2]
DOCS = ROOT / 'docs'
PAGES = [ROOT / 'README.md', ROOT / 'CONTRIBUTING.md', *sorted(DOCS.glob('*.md'))]
_STARTS = 'python', 'evit', 'make', 'launch/', 'pip'  # first words of the commands in indented blocks
_OTHERS = 'export', 'git', 'apt-get', 'curl', 'uv', 'cd'  # commands that are not part of the project


class Block(NamedTuple):
    """A code block of a page."""

    language: str  # '' for an indented block
    text: str


def blocks(text: str) -> list[Block]:
    """Lists the code blocks of a page: fenced ones and those indented by four spaces."""
    found, fence, lines = [], None, []
    for line in [*text.splitlines(), '']:
        if line.startswith('```'):
            if fence is None:
                fence, lines = line[3:].strip(), []
            else:
                found.append(Block(fence, '\n'.join(lines)))
                fence, lines = None, []
        elif fence is not None or line.startswith('    '):
            lines.append(line if fence is not None else line[4:])
        elif lines:
            found.append(Block('', '\n'.join(lines)))
            lines = []
    return found


def commands(page: pathlib.Path) -> list[list[str]]:
    """Lists the commands of a page as words, without environment variables and comments.

    Raises:
      ValueError: a line of a bash block begins with an unknown command.
    """
    lines = []
    for block in blocks(page.read_text()):
        if block.language in ('', 'bash'):
            joined = re.sub(r'\\\n\s*', ' ', block.text).splitlines()
            lines += [line for line in joined if block.language == 'bash' or line.startswith(_STARTS)]
    split = [shlex.split(line, comments=True) for line in lines]
    return [words for words in map(_command, split) if words and words[0] not in _OTHERS and _known(page, words)]


def links(text: str) -> list[str]:
    """Lists the targets of the links and pictures of a page that are not on other servers."""
    targets = re.findall(r'\]\(([^)\s]+)\)|(?:src|srcset)="([^"]+)"', text)
    return [target for pair in targets for target in pair if target and '://' not in target and target[:2] != '..']


def anchors(text: str) -> set[str]:
    """Returns the anchors of the headings of a page, as the site and GitHub make them."""
    headings = re.findall(r'^#+ (.+)$', text, re.MULTILINE)
    return {re.sub(r'\s+', '-', re.sub(r'[^\w\s-]', '', heading.lower()).strip()) for heading in headings}


def _command(words):
    while words and re.fullmatch(r'[A-Z_]+=.*', words[0]):
        words = words[1:]
    return [word for word in words if word != '&']


def _known(page, words):
    if not words[0].startswith(_STARTS):
        raise ValueError(f'{page.name}: unknown command {" ".join(words)!r}: add {words[0]} to the known commands')
    return True
