"""`Listeners`: what a page does when its widgets change, and where it shows errors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from grutrace.errors import GrutraceError
from grutrace.view.live.controls import Controls


class Listeners:
    """Calls functions for the user's changes, and not for those of the page itself.

    Args:
        widgets: The widgets; errors are shown in `Controls.problem`.
    """

    def __init__(self, widgets: Controls) -> None:
        self._problem = widgets.problem
        self._setting = False

    def on(self, model: Any, name: str, act: Callable[[], None]) -> None:
        """Call a function when the user changes a property."""

        def changed(attribute: str, old: object, new: object) -> None:  # noqa: ARG001
            if not self._setting:
                self.guarded(act)

        model.on_change(name, changed)

    def set(self, model: Any, **values: Any) -> None:
        """Set properties without acting as if the user had."""
        before, self._setting = self._setting, True
        try:
            model.update(**values)
        finally:
            self._setting = before

    def guarded(self, act: Callable[[], None]) -> None:
        """Call a function, and show its error on the page."""
        try:
            act()
        except GrutraceError as error:
            self.say([str(error)])

    def say(self, problems: list[str]) -> None:
        """Show messages, in place of former ones."""
        self._problem.update(
            text=" \N{MIDDLE DOT} ".join(problems), visible=any(map(bool, problems))
        )

    @property
    def said(self) -> list[str]:
        """The messages that are shown."""
        return [self._problem.text] if self._problem.visible else []
