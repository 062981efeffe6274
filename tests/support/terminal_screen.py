"""A small terminal: what is on its screen after some output."""

from __future__ import annotations

import io
import re

_CODE = re.compile(r"\x1b\[([?\d;]*)([A-Za-z])")


class Terminal(io.StringIO):
    """A stream that says it is a terminal, and keeps what a program writes."""

    encoding = "utf-8"
    width = 100

    def isatty(self) -> bool:
        return True

    @property
    def lines(self) -> list[str]:
        """The lines on a screen of unlimited height, without spaces at their ends."""
        return [line.rstrip() for line in self._interpreted()[0]]

    @property
    def has_cursor(self) -> bool:
        """Whether the cursor is visible."""
        return self._interpreted()[1]

    def _interpreted(self) -> tuple[list[str], bool]:
        lines, row, column, is_visible, text = [""], 0, 0, True, self.getvalue()
        while text:
            code = _CODE.match(text)
            if code is None:
                char, text = text[0], text[1:]
                assert char not in "\x1b\x07\x08", "a control character that no test expects"
                if char == "\n":
                    row, column = row + 1, 0
                    lines += [""] * (row == len(lines))
                elif char == "\r":
                    column = 0
                else:
                    if column == self.width:
                        row, column = row + 1, 0
                        lines += [""] * (row == len(lines))
                    before = lines[row].ljust(column)
                    lines[row] = before[:column] + char + before[column + 1 :]
                    column += 1
                continue
            text = text[code.end() :]
            match code.groups():
                case (count, "A"):
                    row -= int(count or 1)
                    assert row >= 0, "above the first line"
                case ("2", "K"):
                    lines[row] = ""
                case ("?25", end):
                    is_visible = end == "h"
                case (_, "m"):  # colours
                    pass
                case other:
                    raise AssertionError(f"a code that no test expects: {other}")
        return lines, is_visible
