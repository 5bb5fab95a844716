"""What each of many ranks has found, in a file of its own, so that no rank waits for another."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from torchclip.cli.run.mistakes import Remark


class RankNotes:
    """The remarks of the ranks on this machine; the first rank reads what the others have written so far."""

    def __init__(self) -> None:
        environment = os.environ
        self._rank = int(environment.get("RANK", "0"))
        self._directory: Path | None = None
        if int(environment.get("WORLD_SIZE", "1")) > 1:
            # The processes of one launcher on a machine have it as their parent, and a port of their own.
            key = f"torchclip-run-{os.getppid()}-{environment.get('MASTER_PORT', '')}"
            self._directory = Path(tempfile.gettempdir()) / key
            self._directory.mkdir(exist_ok=True)

    def write(self, remarks: Sequence[Remark]) -> None:
        """Write this rank's remarks, unless the first rank has already read them."""
        if self._rank and self._directory is not None and self._directory.is_dir():
            part = self._directory / f"{self._rank}.part"
            with contextlib.suppress(FileNotFoundError):  # the first rank reads just now
                part.write_text(json.dumps(remarks), encoding="utf-8")
                part.replace(part.with_suffix(".json"))

    def collect(self, own: Sequence[Remark]) -> list[Remark]:
        """The remarks of the first rank, and those that only other ranks have; removes the files."""
        found = list(own)
        if self._directory is None:
            return found
        of_ranks = {int(path.stem): path for path in self._directory.glob("*.json")}
        for rank, path in sorted(of_ranks.items()):
            for remark in map(Remark._make, json.loads(path.read_text(encoding="utf-8"))):
                if not any(each.place == remark.place and each.kind == remark.kind for each in found):
                    found.append(remark._replace(place=f"on rank {rank}, {remark.place}"))
        shutil.rmtree(self._directory, ignore_errors=True)
        return sorted(found, key=lambda remark: not remark.is_mistake)
