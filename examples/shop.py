"""An environment with tools: a shop that sells what it has. The class of the guide, as it stands.

align env try examples/shop.py:Shop --data orders.jsonl --replies replies.jsonl
"""

from __future__ import annotations

from rewards import environment


@environment
class Shop:
    """Orders of customers; each row says what is in stock, and what is wanted."""

    def reset(self, row: dict[str, object]) -> None:
        self.stock: dict[str, int] = dict(row["stock"])  # type: ignore[call-overload]
        self.wanted, self.sold = row["wanted"], ""

    def count(self, article: str) -> str:
        """How many there are of an article.

        Args:
            article: its name
        """
        return str(self.stock.get(article, 0))

    async def sell(self, article: str, pieces: int = 1) -> str:
        """Sell pieces of an article."""
        if pieces > self.stock.get(article, 0):
            raise ValueError(f"there are only {self.stock.get(article, 0)}")  # the model reads it
        self.sold = article
        return "sold"

    def reward(self) -> float:
        return float(self.sold == self.wanted)
