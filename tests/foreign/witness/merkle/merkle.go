// Package merkle passes on the released merkle module, as the one that the witness names is not
// served by module proxies. It lacks subtree proofs, which add-checkpoint does not use.
package merkle

import original "original.invalid/merkle"

// LogHasher is the released one.
type LogHasher = original.LogHasher
