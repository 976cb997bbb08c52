"""The Ray seam: the target and its shards as actors, and where in a cluster they are. No other folder names ray."""

from fedmerge.system.offline import silence

silence()
