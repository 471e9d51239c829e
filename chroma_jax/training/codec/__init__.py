"""What the training of the Codec needs beside the Codec: losses, discriminators, moving codebooks."""
