"""What every block of the configuration is made of."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Count = Annotated[int, Field(gt=0, lt=2**63, strict=True)]
Number = Annotated[float, Field(strict=True)]
Flag = Annotated[bool, Field(strict=True)]


class Block(BaseModel):
    """A JSON object that allows no other keys than its fields."""

    model_config = ConfigDict(extra="forbid")


class StrictBlock(Block):
    """A block of ours: no conversion between types, so ``"8"`` is not 8."""

    model_config = ConfigDict(extra="forbid", strict=True)
