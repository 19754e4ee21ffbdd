"""Which experts every token went to, returned with an answer: `--enable-return-routed-experts` for our mixtures."""
