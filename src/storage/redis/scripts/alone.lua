-- Most often nobody waits for a lock that is given up. Then what follows need not even be set up.
local found = redis.call('MGET', KEYS[1], KEYS[2])
if found[1] == ARGV[1] and not found[2] then return redis.call('DEL', KEYS[1]) end
