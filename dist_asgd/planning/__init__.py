"""Planning: the bytes a rank needs and the traffic of a step, by mode, before anything is built.

``dist_asgd.plan`` and ``dist-asgd plan`` are this package. It needs no process group, no GPU and no memory of the
model's size: the classes that the optimizer itself is made of lay out parameters on the meta device, for one rank.

sources.py   what a plan can be made of: modules, parameters, safetensors files, configurations, numbers of parameters
shapes.py    the result of reading one: names, shapes and dtypes
setup.py     what does not depend on the model: ranks, nodes, options, and how the backend sends
modes.py     the bytes on a rank in each mode
traffic.py   what a rank sends in a step in each mode
choice.py    which mode to take, and why
planner.py   ``plan`` and the ``Plan`` that it returns
table.py     a plan as text
command.py   ``dist-asgd plan``
"""
