"""`python -m fedmerge.simulate SCENARIO`: the main job, as in `fedmerge simulate`."""

from fedmerge.cli.simulate import simulate_alone

if __name__ == "__main__":
    simulate_alone()
