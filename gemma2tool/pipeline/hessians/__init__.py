"""Files of Hessians, collected once from the unquantized model, for calibrations of any type.

``collect`` runs the model, ``file`` writes what it sums, ``merge`` adds up the parts of shards, ``run`` is the command.
``calibration.collected`` reads the files.
"""
