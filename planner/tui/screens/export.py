"""Write a plan's files into a folder."""

from __future__ import annotations

from pathlib import Path

from textual import on, work
from textual.app import ComposeResult
from textual.containers import Vertical
from textual.screen import ModalScreen
from textual.widgets import Input, Static

from planner.tui.messages import FilesWritten, Session, WorkerFailed


class ExportScreen(ModalScreen[None]):
    """Ask for a folder and write `plan.json` and the TensorRT-LLM files there."""

    BINDINGS = [("escape", "dismiss", "Cancel")]  # noqa: RUF012  Textual's form

    def __init__(self, session: Session, *, folder: str = "") -> None:
        super().__init__()
        self.plan_session = session
        self.folder = folder or f"plan-{session.problem.workload.name}-{session.problem.gpu.name}"

    def compose(self) -> ComposeResult:
        """Lay out the dialog."""
        with Vertical(classes="dialog"):
            yield Static("Export to a folder: Enter writes, Esc cancels", classes="title")
            yield Input(self.folder, placeholder="folder", compact=True)
            yield Static("", id="export-problem", classes="problem", markup=False)
            yield Static(
                "plan.json, llm_api_options.yaml, serve.sh, bench.sh, dataset.jsonl and, where the "
                "checkpoint must be quantized first, quantize.sh",
                markup=False,
            )

    @on(Input.Submitted)
    def submit(self, event: Input.Submitted) -> None:
        """Write, if a folder is named."""
        if event.value.strip():
            self.write(event.value.strip())
        else:
            self._refuse("name a folder")

    @work(thread=True, exclusive=True, group="export", exit_on_error=False)
    def write(self, folder: str) -> None:
        """Write the files."""
        from planner.plans.artifacts import write_plan_files  # noqa: PLC0415  first paint

        at = self.plan_session
        try:
            path = Path(folder).expanduser()
            write_plan_files(at.plan, problem=at.problem, folder=path, seed=at.request.seed)
            self.post_message(FilesWritten(str(path.resolve())))
        except Exception as error:  # noqa: BLE001  the worker's edge: words at the field
            self.post_message(WorkerFailed("The export", str(error) or repr(error)))

    @on(FilesWritten)
    def close(self, event: FilesWritten) -> None:
        """Say where the files are."""
        self.app.notify(f"Written to {event.folder}", markup=False)
        self.dismiss()

    @on(WorkerFailed)
    def show_failure(self, event: WorkerFailed) -> None:
        """Say at the field why nothing was written."""
        event.stop()
        self._refuse(event.reason)

    def _refuse(self, words: str) -> None:
        self.query_one("#export-problem", Static).update(f"✗ {words}")
