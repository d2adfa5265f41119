"""A proxy before an object store: PORT SERVER_PORT STATE_FILE. The file says, at every moment, how the store is.

well    everything passes
slow    every piece of an answer is half a second late
error   every new connection is answered with HTTP 503
away    every connection is cut, old ones too
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
from pathlib import Path

LATE = 0.5
REFUSAL = b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"


async def main(port: int, server: int, state: Path) -> None:
    """Serve until killed."""

    def now() -> str:
        with contextlib.suppress(FileNotFoundError):
            return state.read_text()
        return "well"

    async def pump(
        reader: asyncio.StreamReader, writer: asyncio.StreamWriter, back: asyncio.StreamWriter | None
    ) -> None:
        """Pass bytes on; ``back``: where a request that fails is answered, None for the direction of answers."""
        with contextlib.suppress(OSError, asyncio.CancelledError):
            while piece := await reader.read(65536):
                how = now()
                if how == "away":
                    break
                if how == "error" and back is not None:
                    back.write(REFUSAL)
                    await back.drain()
                    break
                if how == "slow":
                    await asyncio.sleep(LATE)
                writer.write(piece)
                await writer.drain()
        for each in (writer, back):
            if each is not None:
                each.close()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            up, down = await asyncio.open_connection("127.0.0.1", server)
        except OSError:
            writer.close()
            return
        await asyncio.gather(pump(reader, down, writer), pump(up, writer, None))

    async with await asyncio.start_server(serve, "127.0.0.1", port) as listening:
        await listening.serve_forever()


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])))
