"""The modules of konic 0.1 -> what is now elsewhere: `konic.finetuning.callback` and others are found here."""
