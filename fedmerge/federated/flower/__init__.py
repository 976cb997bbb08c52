"""The Flower seam: sites as Flower clients. Beside cli/deployment, no other folder names flwr."""

from fedmerge.system.offline import silence

silence()
