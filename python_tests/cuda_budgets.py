"""What the compiler may spend on a CUDA kernel, and how its log says what it spent."""

import re

# Registers at which the wanted number of threads still fits on a multiprocessor with 65536.
BUDGETS = [
    (r"delta_linear_kernel.*Li[124]E", 64),  # 1024 threads
    (r"delta_linear_kernel.*Li8E", 128),  # 512
    (r"nm_linear_kernel.*Li[124]ELi\dE", 64),  # 1024
    (r"nm_linear_kernel.*Li8ELi\dE", 128),  # 512
    (r"strip_linear_kernel.*Li[12]ELi3ELi2E", 64),  # two blocks of 512
    (r"strip_linear_kernel.*(Li4ELi4|Li8ELi3)ELi1E", 128),  # one block of 512
    (r"attention_kernel", 255),  # two blocks of 128
    (r"find_stripes_kernel.*Li256E", 168),  # three blocks of 128: 12.8 asks for 165
    (r"find_stripes_kernel", 128),  # four of 128
    (r"unpack_kernel|add_parts_kernel|count_stripes_kernel|list_stripes_kernel", 64),
    (r"fm_walk_kernel", 128),  # 512: more do not fit into shared memory
    (r"embedding_\w+_kernel|words_kernel|swap_kernel|add_kernel", 64),  # 1024 threads
    (r"select_\w+_kernel|sweep_kernel", 64),
    (r"update_kernel", 128),  # 512
]

_SPENT = re.compile(
    r"Function properties for (\S+)\n(?:ptxas)?[\s.]+(\d+) bytes stack frame, (\d+) bytes spill stores, "
    r"(\d+) .*\n.*Used (\d+) registers"
)


# Bytes of stack that 12.8 to 13.5 ask for beyond sm_90, where these kernels have not been timed; none elsewhere.
BLACKWELL_STACKS = [
    (r"attention_kernel.*Li(128|256)E", 144),
    (r"delta_linear_kernel.*Li[14]E", 24),
    (r"strip_linear_kernel.*FragmentTile.*Li2ELi3E", 8),
    (r"embedding_bag_kernel", 32),
]


def check_log(log, stacks=()):
    """Return the names of the kernels of ``log`` (``-Xptxas -v``); all keep to their registers, and none spills.

    ``stacks``: pattern of a name and the bytes that kernels of such a name may put on the stack all the same.
    """
    found = _SPENT.findall(log)
    assert found, log[:2000]
    for function, *numbers in found:
        stack, stores, loads, registers = map(int, numbers)
        allowed = next((size for name, size in stacks if re.search(name, function)), 0)
        assert stack <= allowed, (function, stack)
        assert allowed or stores == loads == 0, function
        budget = next(limit for name, limit in BUDGETS if re.search(name, function))
        assert registers <= budget, (function, registers)
    return {function for function, *_ in found}
