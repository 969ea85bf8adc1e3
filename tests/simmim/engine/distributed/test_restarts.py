"""Ranks that torchrun has started again do not read what those before left in its store."""

from datetime import timedelta

import pytest
import torch.distributed
from torch.distributed import TCPStore, distributed_c10d

from simmim.engine.distributed.restarts import join_restarted_group

TIMEOUT = timedelta(seconds=60)


@pytest.mark.parametrize("restarts", [0, 1, 2])
def test_each_restart_has_keys_of_its_own(restarts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    server = TCPStore("127.0.0.1", 0, is_master=True, timeout=TIMEOUT)
    environment = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": server.port,
        "RANK": 0,
        "WORLD_SIZE": 1,
        "TORCHELASTIC_USE_AGENT_STORE": True,
        "TORCHELASTIC_RESTART_COUNT": restarts,
    }
    for name, value in environment.items():
        monkeypatch.setenv(name, str(value))
    join_restarted_group(TIMEOUT)
    assert torch.distributed.is_initialized() == (restarts > 0)
    if restarts:
        try:
            distributed_c10d._get_default_store().set("key", "value")
            groups = ("default_pg", "0/")  # names in versions of torch
            assert any(server.check([f"restart-{restarts}/{group}/key"]) for group in groups)
        finally:
            torch.distributed.destroy_process_group()
