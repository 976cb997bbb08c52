"""The repository as a Flower app: `flwr run`, in Flower's simulation or on processes of the hospitals. See docs/deployment.md."""

from fedmerge.system.offline import silence

silence()
