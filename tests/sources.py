"""What sources of examples that are made by hand have in common."""

from kdjax.data.examples import Example, Objects


class OfExamples:
    """Answers what is asked of a source without an image from its examples."""

    def __getitem__(self, index: int) -> Example:
        raise NotImplementedError

    def objects(self, index: int) -> Objects:
        fields = self[index]._asdict()
        return Objects(size=fields.pop("image").shape[:2], **fields)

    def size(self, index: int) -> tuple[int, int]:
        return self.objects(index).size

    def image_id(self, index: int) -> int:
        return self.objects(index).image_id

    def name(self, index: int) -> str:
        return f"{self.image_id(index)}.png"
