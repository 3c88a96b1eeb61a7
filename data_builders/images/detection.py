"""The detector's pass over image candidates: where their class is found."""

import json

from tqdm import tqdm

from data_builders.engine.blocks import Images
from data_builders.engine.passes import ModelPass
from data_builders.engine.stages import Record, batched, is_valid
from data_builders.images.judging import open_row
from prefopt.detectors import Box, Detector
from prefopt.files import content_key
from prefopt.ledger import Ledger
from prefopt.loading import Lazy


class DetectObjects(ModelPass[Detector]):
    """Looks for its class in every candidate."""

    name, unit = "detecting", "image"

    def __init__(self, detector: Lazy[Detector], images: Images, ledger: Ledger, *, batch_size: int):
        super().__init__(detector)
        self.images, self.ledger, self.batch_size = images, ledger, batch_size

    def todo(self, block: int) -> int:
        """The images of a block whose boxes are not kept."""
        return sum(map(len, self._missing(self.images.rows(block, images=False))))

    def work(self, block: int, bar: tqdm) -> None:
        """Detect batch by batch."""
        for batch in self._missing(self.images.rows(block)):
            found = self.model.detect([open_row(row) for row in batch], [[row["class"]] for row in batch])
            self.calls += len(batch)
            plain = [[[box.label, *map(float, box[1:])] for box in boxes] for boxes in found]
            self.ledger.add({self.key(row): boxes for row, boxes in zip(batch, plain, strict=True)})
            bar.update(len(batch))

    def boxes(self, row: Record) -> list[Box]:
        """The kept boxes of a candidate, the most confident first."""
        return [Box(*box) for box in self.ledger[self.key(row)]]

    def key(self, row: Record) -> str:
        """A hash of all that the boxes depend on."""
        return content_key(json.dumps([self.identity, row["pixels_sha256"], row["class"]]))

    def _missing(self, rows: list[Record]) -> list[list[Record]]:
        distinct = {self.key(row): row for row in rows if is_valid(row)}
        batches = [list(batch) for batch in batched(distinct.values(), self.batch_size)]
        return [batch for batch in batches if any(self.key(row) not in self.ledger for row in batch)]
