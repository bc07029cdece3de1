"""The terminal user interface: every use case of the planner on screens, no logic of its own."""

from __future__ import annotations

import gc


def run(*, gpu: str = "", model: str = "", workload: str = "", num_gpus: str = "") -> int:
    """Open the interface; what is not given is taken from the last time.

    Returns:
        The exit status.
    """
    gc.disable()  # what is imported and laid out now stays; the first paint turns it on again
    from planner.tui.app import PlannerApp  # noqa: PLC0415  `planner --help` must not wait
    from planner.tui.state import default_state_file  # noqa: PLC0415

    app = PlannerApp(
        state_file=default_state_file(),
        given={"gpu": gpu, "model": model, "workload": workload, "num_gpus": num_gpus},
    )
    app.run()
    return app.return_code or 0
