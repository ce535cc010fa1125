"""Which hosts of a hostfile can take part in a job right now; asked before it is started again."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

from gigatok_ds.cluster import host_facts
from gigatok_ds.cluster.check import probe_hosts
from gigatok_ds.cluster.cluster_report import Expected, problems
from gigatok_ds.cluster.hostfile import Host, read_hostfile
from gigatok_ds.cluster.remote_shell import CHECKOUT, Reach
from gigatok_ds.cluster.ssh_environment import rank_variables

logger = logging.getLogger(__name__)

SECONDS = 60  # for a host to answer


def usable_hosts(hostfile: str, environment: Mapping[str, str], seconds: int = SECONDS) -> list[Host]:
    """The hosts that answer by ssh and have the same code and packages and enough GPUs; says of the others what is
    wrong.

    Asks the hosts that the file names now: a line that was removed since the last start excludes a host.
    """
    hosts, working_dir = read_hostfile(hostfile, environment), str(Path.cwd())
    reach = Reach(ssh=True, variables=rank_variables(environment, Path.home(), Path.cwd()))
    expected = Expected(code=host_facts.source_hash(host_facts.PACKAGE), working_dir=working_dir,
                        checkout=str(CHECKOUT))
    usable = []
    for result in probe_hosts(hosts, reach, None, None, working_dir, seconds):
        wrong = problems([result], expected)
        for line in wrong:
            logger.info("leaving out %s", line)
        if not wrong:
            usable.append(result.host)
    return usable
