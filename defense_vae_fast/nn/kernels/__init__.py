"""Operations of the network that are worth a kernel of their own."""
