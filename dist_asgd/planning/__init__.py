"""Planning: the bytes a rank needs and the traffic of a step, by mode, before anything is built.

``dist_asgd.plan`` and ``dist-asgd plan`` are this package. It needs no process group, no GPU and no memory of the
model's size: the classes that the optimizer itself is made of lay out parameters on the meta device, for one rank.

sources.py   what a plan can be made of: modules, parameters, safetensors files, configurations, numbers of parameters
shapes.py    the result of reading one: names, shapes and dtypes
arguments.py the arguments of ``plan``, checked and completed
setup.py     what does not depend on the model: ranks, nodes, options, and how the backend sends
modes.py     the bytes on a rank in each mode
traffic.py   what a rank sends in a step in each mode
links.py     latency and bandwidth of the links, and how long one call takes on them
timing.py    the time of a step in each mode, and how much of its communication is exposed
choice.py    which mode to take, and why
planner.py   ``plan`` and the ``Plan`` that it returns
table.py     a plan as text
command.py   ``dist-asgd plan``
"""
