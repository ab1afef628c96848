// Package rfc6962 passes on the released one.
package rfc6962

import original "original.invalid/merkle/rfc6962"

// DefaultHasher is the released one.
var DefaultHasher = original.DefaultHasher
