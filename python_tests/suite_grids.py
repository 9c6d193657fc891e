"""Small grids for the tests of the suite."""

TINY = """
[tasks.language]
window = 64
windows = 2
prompt_len = 4
new_tokens = 2
rounds = 1

[recipes.magnitude]
method = "magnitude"

[recipes.wanda]
num_samples = 4
max_length = 64
"""


def cells(models='"demo"', recipes='"magnitude"', sparsities="0.5", seeds="0", more=""):
    return (
        f'[[cells]]\ntask = "language"\nmodels = [{models}]\nrecipes = [{recipes}]\n'
        f"sparsities = [{sparsities}]\nseeds = [{seeds}]\n{more}\n"
    )
